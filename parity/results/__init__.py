"""Many records together: tables, statistics, one verdict."""
