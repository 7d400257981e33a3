"""Architectures by releases: tiny models of all that transformers and mlx-lm both know, asked in turn."""
