"""Which candidates are worth evaluating: an exact solver for seeds, a stored study, proposals, goals, Pareto sets."""
