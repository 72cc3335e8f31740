"""Candidates, boards and reference points, compiled and timed."""
