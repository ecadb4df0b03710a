"""Every error that mlops-ray raises on purpose.

Each error says what happened, where, why, and what to do about it. All derive from
``MlopsRayError``, carry their data as attributes and survive pickling, so that an error raised on
a Ray worker reads the same in the driver.

    MlopsRayError
    ├── ConfigError            the configuration has problems (all of them, at once)
    ├── DataError              the data given to us is not what was declared
    │   ├── SourceError        a source cannot be read
    │   ├── SchemaError        a column is missing or has the wrong type
    │   └── ExpectationError   a declared expectation does not hold
    ├── FeatureStoreError      a feature store cannot do what was asked
    ├── WorkflowError          a workflow is declared wrong, or cannot be run now
    ├── StepError              a step raised
    ├── ArtifactError          an artifact is missing or corrupt, or cannot be one
    │   └── StorageError       the store of artifacts cannot be read or written now
    ├── LedgerError            the ledger cannot be opened, read or written
    │   └── LeaseError         another process owns what this one wants to write
    ├── TrainingError          a model could not be trained
    ├── RegistryError          a model or version is not in the registry
    ├── ServingError           an endpoint cannot be deployed or reached
    │   └── RequestError       one request is refused (HTTP 4xx)
    ├── MonitoringError        a monitor cannot do what was asked
    └── ClusterError           Ray cannot be reached or used
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class MlopsRayError(Exception):
    """Base of all errors of mlops-ray.

    Args:
        what: One sentence: what went wrong.
        where: File, dotted path, step or address concerned, if known.
        why: The cause, if known.
        fix: What the reader can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.why:
            text += f"\n  why: {self.why}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[MlopsRayError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class Problem:
    """One problem of a configuration: where it stands and what is wrong."""

    path: str
    message: str
    file: str = ""
    line: int | None = None
    hint: str = ""

    def __str__(self) -> str:
        source = f"{self.file}:{self.line}" if self.file and self.line else self.file
        place = f"{source} → {self.path}" if source else self.path
        return f"{place}: {self.message}" + (f" {self.hint}" if self.hint else "")


class ConfigError(MlopsRayError):
    """The configuration cannot be used. ``problems`` holds every problem that was found."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the configuration")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DataError(MlopsRayError):
    """The data is not what was declared."""


class SourceError(DataError):
    """A source cannot be read."""


class SchemaError(DataError):
    """A column is missing or has the wrong type."""


class ExpectationError(DataError):
    """An expectation with severity ``fail`` does not hold."""


class FeatureStoreError(MlopsRayError):
    """A feature store cannot do what was asked."""


class WorkflowError(MlopsRayError):
    """A workflow's graph of steps is wrong."""

    exit_code = 2


class StepError(MlopsRayError):
    """A step raised. ``step`` and ``run_id`` name it; ``detail`` holds the worker's traceback."""

    def __init__(self, what: str, *, step: str, run_id: str, detail: str = "", **more: str) -> None:
        super().__init__(what, **more)
        self.step = step
        self.run_id = run_id
        self.detail = detail


class ArtifactError(MlopsRayError):
    """An artifact is missing, its bytes do not match its digest, or a value cannot be stored.

    ``digest`` is that of the artifact concerned; None where there is none.
    """

    def __init__(self, what: str, *, digest: str | None = None, **more: str) -> None:
        super().__init__(what, **more)
        self.digest = digest


class StorageError(ArtifactError):
    """The store of artifacts cannot be read or written now: disk full, read-only, unreachable."""


class LedgerError(MlopsRayError):
    """The ledger cannot be opened, read or written."""


class LeaseError(LedgerError):
    """Another process owns what this one wants to write. ``lease`` is what it holds, if known."""

    def __init__(self, what: str, *, lease: Any = None, **more: str) -> None:
        super().__init__(what, **more)
        self.lease = lease


class TrainingError(MlopsRayError):
    """A model could not be trained or evaluated."""


class RegistryError(MlopsRayError):
    """A model, version or alias is not in the registry, or is refused by it."""


class ServingError(MlopsRayError):
    """An endpoint cannot be deployed or reached."""


class RequestError(ServingError):
    """One request is refused. ``status`` is the HTTP status; ``field`` and ``row`` say where.

    With ``retry_after_s``, nothing was done, and the same request may succeed so much later.
    """

    def __init__(
        self,
        what: str,
        *,
        status: int = 422,
        field: str | None = None,
        row: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what)
        self.status = status
        self.field = field
        self.row = row
        self.retry_after_s = retry_after_s


class MonitoringError(MlopsRayError):
    """A monitor cannot do what was asked."""


class ClusterError(MlopsRayError):
    """Ray cannot be reached or used."""


class JobRefusedError(ClusterError):
    """The job server answers, and refuses a job."""
