"""Arrays against arrays: distances, noise floors, and what a divergence resembles."""
