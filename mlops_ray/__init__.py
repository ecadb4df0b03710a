"""mlops-ray: the whole life of a machine-learning product as one closed loop on Ray."""

__version__ = "0.1.0"
