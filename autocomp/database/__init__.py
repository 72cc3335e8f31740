"""Calibrate, compress each layer once, keep it, stitch candidates."""
