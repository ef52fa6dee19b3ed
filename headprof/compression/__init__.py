"""Compressed caches: what to keep, how it is held, and attention over it."""
