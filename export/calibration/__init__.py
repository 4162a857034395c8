"""Calibration: what goes into every linear layer of a checkpoint, for questions about pictures and for text."""
