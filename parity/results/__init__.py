"""Many records together: known divergences, tables, statistics, one verdict."""
