"""Clients of an endpoint."""
