"""From "they differ" to the one cause: stages, modules, steps, factors, versions."""
