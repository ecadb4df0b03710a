"""Monitoring (C9): profiles, statistics, the monitor actor, reports."""
