"""Compress each layer at each level once, and stitch candidates out of the pieces."""
