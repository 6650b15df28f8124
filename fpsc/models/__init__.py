"""Models to look at and to measure: published ones by name, the user's own, and their inputs."""
