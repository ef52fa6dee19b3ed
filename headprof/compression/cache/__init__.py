"""The cache: rows, layers, when and to what they are compressed."""
