"""Scoring heads: the attention rows that predict an answer, what they say, and the run over many probes."""
