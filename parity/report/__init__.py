"""Records and results as text, tables, figures and pages."""
