"""Needle probes: filler text, needle families, contexts with exact token spans."""
