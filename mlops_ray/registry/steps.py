"""The registry's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.digest import canonical_json
from mlops_ray.metadata.types import ModelVersion, Report
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect
from mlops_ray.registry.registry import Registry


@effect
def register(
    context: Context,
    model_name: str,
    package: Path,
    report: Report,
    alias: str | None = None,
    lineage: dict[str, Any] | None = None,
) -> ModelVersion:
    """Register a package as the next version, with where it came from.

    The run's own provenance (commit, uncommitted changes, configuration, lock file, run) is added;
    ``lineage`` names what only the workflow knows, such as the version of the data. Values that
    are not strings are written as JSON; None is left out.

    Raises:
        RegistryError: The name or the alias cannot be used.
    """
    given = {key: _text(value) for key, value in (lineage or {}).items() if value is not None}
    origin = provenance(context) | given
    version = Registry(context.home).register(model_name, package, report, origin, alias)
    context.reporter.writes("model", f"{version.name}@{version.version}")
    context.reporter.event(
        "registration",
        model=version.name,
        version=version.version,
        alias=alias,
        digest=version.digest,
        auc=report.auc,
        log_loss=report.log_loss,
    )
    return version


def provenance(context: Context) -> dict[str, str]:
    """Return what the ledger knows of the run's origin, under the registry's lineage keys."""
    ledger = open_ledger(context.home)
    try:
        run = ledger.run(context.run_id)
    finally:
        ledger.close()
    if run is None:
        return {"parent_run": context.run_id}
    found = {
        "code_commit": run.provenance.get("commit"),
        "dirty_digest": run.provenance.get("dirty_digest"),
        "config_digest": run.config_digest,
        "lock_digest": run.provenance.get("lock_digest"),
        "parent_run": run.run_id,
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()
