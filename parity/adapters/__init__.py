"""Adapter directories that somebody hands over: what they are, and what is wrong with them."""
