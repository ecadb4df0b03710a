"""Feature store (C4): sources, pipeline, offline and online store, point-in-time join."""
