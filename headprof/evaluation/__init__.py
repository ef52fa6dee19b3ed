"""Evaluation: tasks, metrics, the run, and tables of what it found."""
