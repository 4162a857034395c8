"""Engines behind two protocols, `VisionEncoder` and `Decoder` (see `phisight.backends.base`)."""
