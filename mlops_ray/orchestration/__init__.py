"""Orchestration (C3): steps, graph, plan, executor, cache."""
