"""Block quantisation: schemes, blocks, methods and the bytes of each format."""
