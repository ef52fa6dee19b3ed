"""Methods: independent axes, and the table in which a method is one line."""
