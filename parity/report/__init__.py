"""Records and tables for people."""
