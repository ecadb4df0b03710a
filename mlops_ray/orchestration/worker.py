"""Running calls of a step: arguments made from artifacts, the function called, its output stored."""

from __future__ import annotations

import inspect
import os
import pickle
import shutil
import socket
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from mlops_ray.config.targets import allow, load
from mlops_ray.errors import MlopsRayError, StepError, WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore, open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import Lease, Link
from mlops_ray.orchestration.capture import captured, log_path
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.deadline import TimedOut, limited
from mlops_ray.orchestration.reporting import LiveReporter
from mlops_ray.orchestration.resolution import Argument
from mlops_ray.orchestration.retries import Cause, classify, digest_of
from mlops_ray.orchestration.tracing import nested

_OTHERS = "**"


@dataclass(frozen=True)
class Job:
    """What all calls of one step of a run have in common.

    ``fence`` is the lease under which the worker may write to the ledger; None where the step
    outlives its driver.
    """

    project: str
    home: Home
    run_id: str
    step: str
    target: str
    arguments: dict[str, Any]
    roots: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    pickle: bool = False
    fence: Lease | None = None
    timeout_s: float | None = None
    tracing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: of a mapped step the one for element ``item``, with what it maps over.

    ``traceparent`` is the address of its span, "" where tracing is off.
    """

    item: int = -1
    attempt: int = 1
    elements: dict[str, Any] = field(default_factory=dict)
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with an output or an error, and what is to be recorded of it.

    ``digest`` names the artifact that could not be read, where that was what failed. ``node`` is
    ``host:pid``.
    """

    item: int
    started_at: datetime
    ended_at: datetime
    node: str
    output: ArtifactRef | None = None
    error: StepError | None = None
    cause: Cause = "user"
    digest: str | None = None
    rows: int | None = None
    message: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of a call that succeeded says of it."""
        assert self.output is not None
        return {
            "output": self.output,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "rows": self.output.rows if self.output.rows is not None else self.rows,
            "message": self.message,
            "metrics": self.metrics,
            "params": self.params,
            "node": self.node,
        }


def execute(job: bytes, calls: bytes) -> bytes:
    """Run calls of a step one after the other: a pickled ``Job``, a list of ``Call``; of ``Outcome``.

    An error of one call is in its outcome and does not keep the others from running.
    """
    shared = unpacked(job)
    return pickle.dumps([perform(shared, call) for call in pickle.loads(calls)])


@lru_cache(maxsize=64)
def unpacked(job: bytes) -> Job:
    """Return the job that was pickled."""
    made = pickle.loads(job)
    assert isinstance(made, Job)
    return made


def perform(job: Job, call: Call) -> Outcome:
    """Run one call in this process; its errors are in the outcome."""
    sys.path[:0] = [root for root in job.roots if root not in sys.path]
    allow(job.packages)
    reporter = LiveReporter(job.project, job.home, job.run_id, job.step, call.item, job.fence)
    context = Context(job.project, job.home, job.run_id, job.step, reporter, job.command, call.item)
    started_at = datetime.now(UTC)
    result: dict[str, Any] = {}
    with captured(log_path(job.home, job.run_id, job.step, call.item)) as log:
        try:
            with nested(call.traceparent, job.tracing), limited(job.timeout_s, log):
                result = {"output": _call(job, call, context)}
        except KeyboardInterrupt:
            raise  # the driver's word
        except BaseException as error:
            traceback.print_exc()
            result = {
                "error": _step_error(job, call, error),
                "cause": classify(error),
                "digest": digest_of(error),
            }
        finally:
            shutil.rmtree(context.scratch_path, ignore_errors=True)
    reporter.close()
    return Outcome(
        item=call.item,
        started_at=started_at,
        ended_at=datetime.now(UTC),
        node=f"{socket.gethostname()}:{os.getpid()}",
        rows=reporter.rows,
        message=reporter.message or None,
        metrics=reporter.metrics,
        params=reporter.params,
        links=reporter.links,
        **result,
    )


def _call(job: Job, call: Call, context: Context) -> ArtifactRef:
    artifacts = _artifacts(job.home)
    function = load(job.target)
    output = function(**bind(function, job.arguments | call.elements, context, artifacts))
    return artifacts.put(output, pickle=job.pickle)


@lru_cache(maxsize=4)
def _artifacts(home: Home) -> ArtifactStore:
    return open_artifacts(home)


def bind(
    function: Callable[..., Any],
    given: dict[str, Any],
    context: Context,
    artifacts: ArtifactStore,
) -> dict[str, Any]:
    """Make the arguments of a step function: artifacts read, values checked against annotations.

    All that is given is passed on, so that Python refuses what the function does not take.

    Raises:
        WorkflowError: An input does not fit its annotation.
        ArtifactError: An input's artifact is missing or corrupt.
    """
    adapters = _parameters(function)
    bound: dict[str, Any] = {"context": context} if "context" in adapters else {}
    for name, value in given.items():
        if name not in bound:
            adapter = adapters.get(name, adapters[_OTHERS])
            bound[name] = _fit(function, name, _read(value, artifacts), adapter)
    return bound


@lru_cache(maxsize=256)
def _parameters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Return what checks each parameter, and under ``_OTHERS`` what checks further ones."""
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, Any] = {_OTHERS: Any}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_POSITIONAL:
            key = _OTHERS if parameter.kind is parameter.VAR_KEYWORD else name
            found[key] = Any if name == "context" else hints.get(name, Any)
    if typing.get_origin(found[_OTHERS]) is typing.Unpack:
        found[_OTHERS] = Any
    return {name: _adapter(annotation) for name, annotation in found.items()}


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (
        PydanticUserError
    ):  # models, dataclasses and TypedDicts have a configuration of their own
        return TypeAdapter(annotation)


def _read(value: Any, artifacts: ArtifactStore) -> Any:
    if isinstance(value, Argument):
        return value.value if value.ref is None else artifacts.get(value.ref)
    if isinstance(value, dict):
        return {key: _read(item, artifacts) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item, artifacts) for item in value]
    return value


def _fit(function: Any, name: str, value: Any, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([name, *(str(part) for part in first["loc"])])
        raise WorkflowError(
            f"input {path!r} does not fit: {first['msg']}",
            where=f"{function.__module__}.{function.__qualname__}",
        ) from error


def see_log(run_id: str, step: str, item: int) -> str:
    """Say how to see what a call has printed."""
    which = step if item < 0 else f"{step} --item {item}"
    return f"see its log: mlops-ray logs {run_id} {which}"


def _step_error(job: Job, call: Call, error: BaseException) -> StepError:
    known = isinstance(error, MlopsRayError | TimedOut)
    what = str(error) if known else f"{type(error).__name__}: {error}"
    which = f"step {job.step}" + (f", call {call.item}" if call.item >= 0 else "")
    return StepError(
        what,
        step=job.step,
        run_id=job.run_id,
        detail=traceback.format_exc(),
        where=which,
        fix="" if known else see_log(job.run_id, job.step, call.item),
    )
