"""Captures: asked of worker processes, kept by content, carried as bundles."""
