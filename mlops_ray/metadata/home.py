"""Where a project keeps its state: one folder, called the home."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The paths below a home. All are absolute; the folders are made when first written to."""

    root: Path

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return f"sqlite:///{self.root / 'ledger.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking and registry URI."""
        return f"sqlite:///{self.root / 'mlflow.db'}"

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

    def monitor(self, project: str) -> Path:
        """Folder of a project's monitor state."""
        return self.root / "monitor" / project
