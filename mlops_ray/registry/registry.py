"""Model versions: MLflow's registry, holding model packages with their lineage."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlops_ray.errors import RegistryError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import ModelVersion, Report

LINEAGE = "lineage."
"""Prefix of the version tags that say what a version came from."""

LINEAGE_KEYS = (
    "data_version",
    "code_commit",
    "dirty_digest",
    "config_digest",
    "lock_digest",
    "parent_run",
)
"""What every version should name; ``describe`` shows those that are missing as None."""

_DIGEST = "package_digest"
_WEIGHTS = "weights_digest"
_REPORT = "report"
_ARTIFACT = "package"
_NAME = re.compile(r"[A-Za-z][\w.-]*")
_REF = re.compile(rf"(?P<name>{_NAME.pattern})@(?P<which>[\w.-]+)")


class Registry:
    """The registry of a home. Opening it is free; the first call imports MLflow."""

    def __init__(self, home: Home) -> None:
        self._home = home

    @property
    def _client(self) -> Any:
        return tracking.connect(self._home)

    def register(
        self,
        model_name: str,
        package: Path,
        report: Report,
        lineage: Mapping[str, str],
        alias: str | None = None,
    ) -> ModelVersion:
        """Store a package as the next version of ``model_name``, with metrics and lineage.

        Registering the same package from the same parent run again returns the version there is.

        Raises:
            RegistryError: The name or the alias cannot be used.
            ArtifactError: ``package`` is no readable package.
        """
        self._check_name(model_name)
        content = packages.read(package)
        # Connecting takes the lock too, which one process cannot hold twice.
        tracking.connect(self._home)
        with tracking.locked(self._home):
            self._ensure_model(model_name)
            version = self._same(model_name, content.digest, lineage.get("parent_run"))
        if version is None:
            version = self._create(model_name, content, report, lineage)
        if alias:
            self.set_alias(model_name, alias, version.version)
        return version

    def find(self, ref: str) -> ModelVersion | None:
        """Return what ``name@alias`` or ``name@version`` names, or None."""
        name, which = _parse(ref)
        from mlflow.exceptions import MlflowException

        try:
            if which.isdecimal():
                return self._model_version(self._client.get_model_version(name, which))
            return self._model_version(self._client.get_model_version_by_alias(name, which))
        except MlflowException as error:
            # MLflow says INVALID_PARAMETER_VALUE where a known model has no such alias.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def resolve(self, ref: str) -> ModelVersion:
        """Return what ``name@alias`` or ``name@version`` names.

        Raises:
            RegistryError: There is no such model, alias or version, or its files are gone.
        """
        found = self.find(ref)
        if found is None:
            raise self._unknown(ref)
        if not Path(found.package).is_dir():
            raise RegistryError(
                f"the files of {found.name}@{found.version} are gone",
                where=found.package,
                fix="restore the folder, or register the model again",
            )
        return found

    def set_alias(self, model_name: str, alias: str, version: int) -> None:
        """Make ``alias`` name this version, whatever it named before.

        Raises:
            RegistryError: There is no such version, or MLflow refuses the alias.
        """
        from mlflow.exceptions import MlflowException

        self.resolve(f"{model_name}@{version}")
        try:
            self._client.set_registered_model_alias(model_name, alias, str(version))
        except MlflowException as error:
            raise RegistryError(
                f"{alias!r} cannot be an alias of {model_name}@{version}",
                why=str(error.message),
                fix="use letters, digits, '_' and '-'; not 'latest', not v and a number",
            ) from error

    def remove_alias(self, model_name: str, alias: str) -> None:
        """Make ``alias`` name nothing. The version that it named stays."""
        if alias in self.aliases(model_name):
            self._client.delete_registered_model_alias(model_name, alias)

    def aliases(self, model_name: str) -> dict[str, int]:
        """Return the aliases of a model and the versions that they name; {} for no such model."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_registered_model(model_name).aliases
        except MlflowException:
            return {}
        return {alias: int(version) for alias, version in sorted(found.items())}

    def models(self) -> list[str]:
        """Return the names of all models."""
        names: list[str] = []
        token = None
        while True:
            page = self._client.search_registered_models(max_results=1000, page_token=token)
            names += [model.name for model in page]
            token = page.token
            if not token:
                return sorted(names)

    def versions(self, model_name: str) -> list[ModelVersion]:
        """Return all versions of a model, oldest first; [] for no such model."""
        return [self._model_version(found) for found in self._all(model_name)]

    def origins(self) -> dict[str, str | None]:
        """Return the run that registered each version of every model: ``flights@7``."""
        parent = f"{LINEAGE}parent_run"
        return {
            f"{name}@{found.version}": found.tags.get(parent)
            for name in self.models()
            for found in self._all(name)
        }

    def describe(self, ref: str) -> dict[str, Any]:
        """Return everything that is known of a version, as a JSON value.

        Keys: name, version, aliases, digest, weights_digest, package, created_at (ms since 1970),
        lineage (with every one of ``LINEAGE_KEYS``), metrics, params, report, training, run_id.

        Raises:
            RegistryError: As ``resolve``.
        """
        version = self.resolve(ref)
        found = self._client.get_model_version(version.name, str(version.version))
        run = self._client.get_run(found.run_id)
        lineage: dict[str, str | None] = dict.fromkeys(LINEAGE_KEYS)
        lineage |= {
            key.removeprefix(LINEAGE): value
            for key, value in found.tags.items()
            if key.startswith(LINEAGE)
        }
        aliases = self.aliases(version.name)
        return {
            "name": version.name,
            "version": version.version,
            "aliases": [alias for alias, number in aliases.items() if number == version.version],
            "digest": version.digest,
            "weights_digest": found.tags.get(_WEIGHTS),
            "package": version.package,
            "created_at": found.creation_timestamp,
            "lineage": lineage,
            "metrics": dict(run.data.metrics),
            "params": dict(run.data.params),
            "report": Report.model_validate_json(found.tags[_REPORT]).model_dump(mode="json"),
            "training": packages.read(version.package).manifest.training,
            "run_id": found.run_id,
        }

    def _create(
        self,
        model_name: str,
        content: packages.Package,
        report: Report,
        lineage: Mapping[str, str],
    ) -> ModelVersion:
        client = self._client
        tags = {f"{LINEAGE}{key}": str(value) for key, value in lineage.items()}
        tags |= {_DIGEST: content.digest, _WEIGHTS: content.weights_digest}
        experiment = tracking.experiment(client, self._home, model_name)
        run = client.create_run(experiment, run_name=f"{model_name} model", tags=tags)
        run_id = run.info.run_id
        try:
            client.log_batch(run_id, metrics=_metrics(content, report), params=_params(content))
            client.log_artifacts(run_id, str(content.path), _ARTIFACT)
            made = client.create_model_version(
                model_name,
                source=f"{run.info.artifact_uri}/{_ARTIFACT}",
                run_id=run_id,
                tags=tags | {_REPORT: report.model_dump_json()},
            )
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
        return self._model_version(made)

    def _ensure_model(self, model_name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _same(self, model_name: str, digest: str, parent_run: str | None) -> ModelVersion | None:
        for found in self._all(model_name):
            same_run = found.tags.get(f"{LINEAGE}parent_run") == parent_run
            if parent_run and same_run and found.tags.get(_DIGEST) == digest:
                return self._model_version(found)
        return None

    def _all(self, model_name: str) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name='{model_name}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda item: int(item.version))

    def _model_version(self, found: Any) -> ModelVersion:
        return ModelVersion(
            name=found.name,
            version=int(found.version),
            package=_local_path(found.source),
            digest=found.tags.get(_DIGEST, ""),
        )

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"{name!r} cannot be a model's name",
                fix="use letters, digits, '_', '-' and '.', beginning with a letter",
            )

    def _unknown(self, ref: str) -> RegistryError:
        name, which = _parse(ref)
        models = self.models()
        if name not in models:
            return RegistryError(f"there is no model {name!r}", fix=_suggest(name, models))
        choices = [*self.aliases(name), *(str(found.version) for found in self.versions(name))]
        kind = "version" if which.isdecimal() else "alias"
        return RegistryError(f"{name} has no {kind} {which!r}", fix=_suggest(which, choices))


def _parse(ref: str) -> tuple[str, str]:
    match = _REF.fullmatch(ref)
    if match is None:
        raise RegistryError(
            f"{ref!r} names no model version", fix="write name@alias or name@version: flights@3"
        )
    return match["name"], match["which"]


def _suggest(name: str, known: Iterable[str]) -> str:
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(choices)}" if choices else "run the train workflow first"


def _metrics(content: packages.Package, report: Report) -> list[Any]:
    from mlflow.entities import Metric

    stamp = int(time.time() * 1000)
    values = {
        "test_auc": report.auc,
        "test_log_loss": report.log_loss,
        "test_calibration_error": report.calibration_error,
        "test_rows": float(report.rows),
        "test_positives": float(report.positives),
    }
    metrics = [Metric(name, value, stamp, 0) for name, value in values.items()]
    for epoch in content.manifest.training.get("history", []):
        step = int(epoch["epoch"])
        metrics += [Metric(n, v, stamp, step) for n, v in epoch.items() if n != "epoch"]
    return metrics


def _params(content: packages.Package) -> list[Any]:
    from mlflow.entities import Param

    manifest = content.manifest
    values: dict[str, Any] = {"model": manifest.model.target}
    values |= {f"model.{k}": v for k, v in manifest.model.arguments.items()}
    settings = manifest.training.get("settings", {})
    values |= {f"training.{k}": v for k, v in settings.items()}
    values["seed"] = manifest.training.get("seed")
    return [Param(name, str(value)[:6000]) for name, value in values.items()]


def _local_path(source: str) -> str:
    if source.startswith("file:"):
        return unquote(urlparse(source).path)
    return source
