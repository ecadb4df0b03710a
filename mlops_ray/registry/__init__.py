"""Model registry (C6): packages, versions and aliases in MLflow."""
