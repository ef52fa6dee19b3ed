"""Rows of the tables that the command line shows."""
