"""Kernels: what they compute, how they are scheduled, and the store of what tuning found."""
