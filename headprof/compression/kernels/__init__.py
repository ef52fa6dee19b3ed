"""Attention over ragged rows, and sums of attention: reference, torch and CUDA."""
