"""What a target is, what this machine is, and how to time on it undisturbed."""
