"""Settings: where they come from, how files of them are read, and how their faults are told."""
