"""Faults, and harmless variants, planted in the real path `mlx`, each with what is true of it."""
