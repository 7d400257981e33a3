"""Tells whether an MLX fine-tuning path does the same thing as its reference."""

__version__ = "0.1.0"
