"""Pareto set, knee, goals: pure functions."""
