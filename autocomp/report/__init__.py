"""A run folder's results as data (JSON, CSV) and as one self-contained page; needs neither torch nor TVM."""
