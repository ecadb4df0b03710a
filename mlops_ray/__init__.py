"""mlops-ray: the whole life of a machine-learning product as one closed loop on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlops_ray.errors import (
    ArtifactError,
    ClusterError,
    ConfigError,
    DataError,
    ExpectationError,
    FeatureStoreError,
    JobRefusedError,
    LeaseError,
    LedgerError,
    MlopsRayError,
    MonitoringError,
    RegistryError,
    RequestError,
    SchemaError,
    ServingError,
    SourceError,
    StepError,
    StorageError,
    TrainingError,
    WorkflowError,
)

if TYPE_CHECKING:
    from mlops_ray.api import Run, Session, connect
    from mlops_ray.orchestration.context import Context
    from mlops_ray.orchestration.declare import workflow
    from mlops_ray.orchestration.marks import effect, ensure
    from mlops_ray.serving.client.hedging import Hedging
    from mlops_ray.serving.client.http import AsyncClient, Client
    from mlops_ray.serving.client.results import Explanation, Prediction
    from mlops_ray.serving.client.retries import Retries

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "AsyncClient",
    "Client",
    "ClusterError",
    "ConfigError",
    "Context",
    "DataError",
    "ExpectationError",
    "Explanation",
    "FeatureStoreError",
    "Hedging",
    "JobRefusedError",
    "LeaseError",
    "LedgerError",
    "MlopsRayError",
    "MonitoringError",
    "Prediction",
    "RegistryError",
    "RequestError",
    "Retries",
    "Run",
    "SchemaError",
    "ServingError",
    "Session",
    "SourceError",
    "StepError",
    "StorageError",
    "TrainingError",
    "WorkflowError",
    "__version__",
    "connect",
    "effect",
    "ensure",
    "workflow",
]

_LAZY = {
    "AsyncClient": "mlops_ray.serving.client.http",
    "Client": "mlops_ray.serving.client.http",
    "Context": "mlops_ray.orchestration.context",
    "Explanation": "mlops_ray.serving.client.results",
    "Hedging": "mlops_ray.serving.client.hedging",
    "Prediction": "mlops_ray.serving.client.results",
    "Retries": "mlops_ray.serving.client.retries",
    "Run": "mlops_ray.api",
    "Session": "mlops_ray.api",
    "connect": "mlops_ray.api",
    "effect": "mlops_ray.orchestration.marks",
    "ensure": "mlops_ray.orchestration.marks",
    "workflow": "mlops_ray.orchestration.declare",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import mlops_ray`` itself stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'mlops_ray' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
