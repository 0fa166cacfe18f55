"""Readers of a run's events: the terminal and metrics.csv. They can neither change nor slow a run."""
