"""What the steps of a GitHub workflow do: jobs, pins, annotations, versions that moved."""
