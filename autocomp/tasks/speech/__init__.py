"""The built-in task ``speech``: spoken letters and digits written down, by a small Conformer with a CTC head."""
