"""The models that a replica holds."""
