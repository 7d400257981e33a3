"""Paths: the only place where frameworks are imported, and there only inside functions."""
