"""Configuration: Hydra composes, pydantic checks, the rest of the package sees frozen objects."""
