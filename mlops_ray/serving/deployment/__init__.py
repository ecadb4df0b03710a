"""Endpoints on Ray Serve: how they are started, changed, found and removed."""
