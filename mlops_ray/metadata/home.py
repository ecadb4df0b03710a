"""Where a project keeps its state: one folder, called the home."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mlops_ray.config.base import Frozen

STORAGE_VARIABLES = {
    "ledger": "MLOPS_RAY_LEDGER",
    "artifacts": "MLOPS_RAY_ARTIFACTS",
    "tracking": "MLOPS_RAY_TRACKING",
}
"""Environment variables that name servers in place of the home's own files."""


class Storage(Frozen):
    """Servers in place of the home's own files; None keeps them in the folder.

    They may hold passwords, so they come from the environment and not from the configuration, which
    is recorded with every run.

    Args:
        ledger: SQLAlchemy URL of PostgreSQL: ``postgresql+psycopg://user:password@host/database``.
        artifacts: A bucket and prefix: ``s3://bucket/prefix``, with pyarrow's options of that file
            system in the query (``?region=eu-central-1&endpoint_override=…``).
        tracking: MLflow's tracking and registry server.
    """

    ledger: str | None = None
    artifacts: str | None = None
    tracking: str | None = None

    @classmethod
    def from_environment(cls) -> Storage:
        """Return what the environment variables say."""
        return cls(**{name: os.environ.get(key) or None for name, key in STORAGE_VARIABLES.items()})


@dataclass(frozen=True)
class Home:
    """The paths below a home. All are absolute; the folders are made when first written to.

    ``storage`` names the servers that hold what is not in the folder; it travels with the home.
    """

    root: Path
    storage: Storage = field(default_factory=Storage.from_environment, repr=False)

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return self.storage.ledger or f"sqlite:///{self.root / 'ledger.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking and registry URI."""
        return self.storage.tracking or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Folder of MLflow's artifacts."""
        return self.root / "mlflow"

    @property
    def artifacts(self) -> Path:
        """Folder of content-addressed artifacts."""
        return self.root / "artifacts"

    @property
    def training(self) -> Path:
        """Folder of Ray Train's checkpoints."""
        return self.root / "training"

    @property
    def reproductions(self) -> Path:
        """Folder of versions that are being made again."""
        return self.root / "reproductions"

    def run(self, run_id: str) -> Path:
        """Folder of one run: logs, reports, anything a person may open."""
        return self.root / "runs" / run_id

    def offline(self, project: str) -> Path:
        """Folder of a project's offline feature tables."""
        return self.root / "features" / project / "offline"

    def online(self, project: str) -> Path:
        """Folder of a project's online feature store."""
        return self.root / "features" / project / "online"

    def events(self, project: str) -> Path:
        """Folder of the events that a project's sources have streamed in."""
        return self.root / "features" / project / "events"

    def predictions(self, project: str) -> Path:
        """Folder of a project's prediction log."""
        return self.root / "predictions" / project

    def served(self, project: str, epoch: int) -> Path:
        """File that says to which models an endpoint has changed that was declared with ``epoch``."""
        return self.root / "serving" / project / f"{epoch}.json"

    def monitor(self, project: str) -> Path:
        """Folder of a project's monitor state."""
        return self.root / "monitor" / project
