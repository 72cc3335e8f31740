"""Front point → files that are read back and checked."""
