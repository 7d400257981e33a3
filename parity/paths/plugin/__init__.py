"""Paths made of functions: what `parity.plugin` offers."""
