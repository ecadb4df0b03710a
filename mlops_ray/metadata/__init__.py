"""Metadata (C7): the ledger, artifacts, provenance, and the MLflow mirror."""
