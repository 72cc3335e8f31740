"""What compression costs in accuracy: calibration statistics, and proxies from cheap to dear."""
