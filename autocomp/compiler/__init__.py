"""From a torch model to a compiled module whose kernels are tuned."""
