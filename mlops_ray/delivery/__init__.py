"""Delivery (C1): gate, promotion, rollout."""
