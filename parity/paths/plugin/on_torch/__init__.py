"""Paths on torch made of functions."""
