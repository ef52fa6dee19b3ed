"""Profile the attention heads of a language model, and spend a key/value-cache budget where it pays."""

__version__ = "0.1.0"
