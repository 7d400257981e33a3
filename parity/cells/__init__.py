"""Cells: one probe for one pair and one seed; a run fills a matrix of them."""
