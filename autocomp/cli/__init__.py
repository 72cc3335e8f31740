"""The command line: its commands, and the tables they print."""
