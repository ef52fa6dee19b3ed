"""Rows of the tables that the command line shows, one file a command: `(columns, rows)` or `(columns, rows, title)`."""
