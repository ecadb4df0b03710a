"""Training (C5): Ray Train and Ray Tune, evaluation, determinism."""
