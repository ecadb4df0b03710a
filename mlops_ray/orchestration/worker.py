"""Running one step: arguments made from artifacts, the function called, its output stored."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import sys
import time
import traceback
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mlops_ray.config.targets import allow, load
from mlops_ray.errors import MlopsRayError, StepError, WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.resolution import Argument

_LEAST_BETWEEN_UPDATES_S = 0.5


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs to run one step of a run."""

    project: str
    home: Path
    run_id: str
    step: str
    target: str
    arguments: dict[str, Any]
    roots: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


class LedgerReporter:
    """A reporter that writes to the ledger; progress at most twice a second."""

    def __init__(self, ledger: Ledger, task: Task) -> None:
        self._ledger = ledger
        self._task = task
        self._last_update_s = 0.0
        self._rows: int | None = None
        self._message = ""
        self._metrics: dict[str, float] = {}
        self._params: dict[str, Any] = {}

    def progress(self, *, rows: int | None = None, message: str = "") -> None:
        """Record rows done and a message."""
        self._rows = rows if rows is not None else self._rows
        self._message = message or self._message
        if time.monotonic() - self._last_update_s >= _LEAST_BETWEEN_UPDATES_S:
            self.flush()

    def flush(self) -> None:
        """Write the latest progress now."""
        self._last_update_s = time.monotonic()
        self._update(rows=self._rows, message=self._message or None)

    def metric(self, name: str, value: float) -> None:
        """Record a metric."""
        self._metrics[name] = float(value)
        self._update(metrics=self._metrics)

    def param(self, name: str, value: Any) -> None:
        """Record a parameter."""
        self._params[name] = value
        self._update(params=self._params)

    def event(self, kind: str, **data: Any) -> None:
        """Append an event to the ledger."""
        self._ledger.append(
            self._task.project, kind, data, run_id=self._task.run_id, step=self._task.step
        )

    def _update(self, **values: Any) -> None:
        self._ledger.update_step(self._task.run_id, self._task.step, **values)


def execute(task: Task) -> ArtifactRef:
    """Run a step and return the address of its output.

    Raises:
        StepError: The step raised; carries the headline and the traceback.
    """
    sys.path[:0] = [root for root in task.roots if root not in sys.path]
    allow(task.packages)
    home = Home(task.home)
    ledger = Ledger(home.ledger_url)
    try:
        with _logged(home.run(task.run_id) / "logs" / f"{task.step}.log"):
            return _call(task, home, ledger)
    finally:
        ledger.close()


def _call(task: Task, home: Home, ledger: Ledger) -> ArtifactRef:
    reporter = LedgerReporter(ledger, task)
    context = Context(task.project, home, task.run_id, task.step, reporter, task.command)
    artifacts = ArtifactStore(home.artifacts)
    try:
        function = load(task.target)
        output = function(**bind(function, task.arguments, context, artifacts))
        reporter.flush()
        return artifacts.put(output)
    except Exception as error:
        traceback.print_exc()
        raise _step_error(task, error) from None
    finally:
        shutil.rmtree(home.run(task.run_id) / "scratch" / task.step, ignore_errors=True)


def bind(
    function: Any, given: dict[str, Any], context: Context, artifacts: ArtifactStore
) -> dict[str, Any]:
    """Make the arguments of a step function: artifacts read, values checked against annotations.

    Raises:
        WorkflowError: An input does not fit its annotation.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    bound: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        if name == "context":
            bound[name] = context
        elif name in given:
            value = _read(given[name], artifacts)
            bound[name] = _fit(function, name, value, hints.get(name, Any))
    return bound


def _read(value: Any, artifacts: ArtifactStore) -> Any:
    if isinstance(value, Argument):
        return value.value if value.ref is None else artifacts.get(value.ref)
    if isinstance(value, dict):
        return {key: _read(item, artifacts) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item, artifacts) for item in value]
    return value


def _fit(function: Any, name: str, value: Any, annotation: Any) -> Any:
    is_model = inspect.isclass(annotation) and issubclass(annotation, BaseModel)
    config = None if is_model else ConfigDict(arbitrary_types_allowed=True)
    try:
        return TypeAdapter(annotation, config=config).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([name, *(str(part) for part in first["loc"])])
        raise WorkflowError(
            f"input {path!r} does not fit: {first['msg']}",
            where=f"{function.__module__}.{function.__qualname__}",
        ) from error


def _step_error(task: Task, error: Exception) -> StepError:
    known = isinstance(error, MlopsRayError)
    what = str(error) if known else f"{type(error).__name__}: {error}"
    return StepError(
        what,
        step=task.step,
        run_id=task.run_id,
        detail=traceback.format_exc(),
        where=f"step {task.step}",
        fix="" if known else f"see the step's log: {task.step}.log of run {task.run_id}",
    )


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", buffering=1, encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
