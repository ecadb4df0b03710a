"""The steps that the loop offers to workflows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.config.monitoring import Loop, Monitoring, Replay
from mlops_ray.errors import FeatureStoreError
from mlops_ray.loop.controller import ControllerSpec
from mlops_ray.loop.recording import Recording
from mlops_ray.loop.results import MonitorHandle, ReplayResult
from mlops_ray.metadata.types import Endpoint
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.jobs import JobCommand, shipped_directory, told_environment
from mlops_ray.orchestration.marks import effect, ensure

TOKEN_VARIABLE = "MLOPS_RAY_TOKEN"
CA_VARIABLE = "MLOPS_RAY_CA_FILE"


@ensure
def monitor(
    context: Context, project: str, endpoint: Endpoint, monitoring: Monitoring, loop: Loop
) -> MonitorHandle:
    """Start the controller of an endpoint, on the machine's clock, and leave it running.

    One that runs already follows the new declarations and keeps its memory.
    """
    from mlops_ray.loop.actor import actor_name, ensure
    from mlops_ray.metadata.delta import MONITOR_NAMESPACE

    ensure(_spec(context, project, endpoint, monitoring, loop, virtual=False))
    context.reporter.reads("deployment", endpoint.name)
    context.reporter.event("monitor", actor=actor_name(project), endpoint=endpoint.url)
    return MonitorHandle(project=project, actor=actor_name(project), namespace=MONITOR_NAMESPACE)


@effect
def replay(
    context: Context,
    project: str,
    features: Features,
    service: str,
    tables: Path,
    endpoint: Endpoint,
    replay: Replay,
    monitoring: Monitoring,
    loop: Loop,
) -> ReplayResult:
    """Send history to the endpoint on a virtual clock, while the controller acts on what it sees.

    See ``Replayer`` for the order of things. An attempt that was cut short goes on from the last
    whole day, when the step runs again in the same run.

    Args:
        context: Of the run. ``context.command`` with ``workflow=<loop.workflow>`` and
            ``until=<moment>`` is what a retraining runs.
        project: Name of project and endpoint.
        features: The declarations; the label source's table is what is replayed.
        service: The feature service whose inputs make up a request.
        tables: The folder with the cleaned rows of each source.
        endpoint: Where to send them.
        replay: Period, step and concurrency.
        monitoring: What the controller watches.
        loop: When it retrains.

    An endpoint that wants a token gets the one in ``MLOPS_RAY_TOKEN``, and one that speaks TLS is
    checked against the certificate in the file that ``MLOPS_RAY_CA_FILE`` names.
    """
    from mlops_ray.features.online import open_online
    from mlops_ray.features.steps import open_pipeline, tell_versions
    from mlops_ray.features.tables import read_tables
    from mlops_ray.loop.actor import RemoteMonitor, ensure
    from mlops_ray.loop.replay import Replayer
    from mlops_ray.loop.traffic import Traffic
    from mlops_ray.serving.client.http import AsyncClient

    labels, found = features.labels, read_tables(tables)
    inputs = tuple(features.services[service].inputs)
    traffic = Traffic(_table(found, labels.source), inputs, labels, replay.start, replay.end)
    spec = _spec(context, project, endpoint, monitoring, loop, virtual=True)
    handle = ensure(spec)
    recording = Recording(context.home.run(context.run_id) / "replay")
    if recording.cursor() is not None:
        # It goes back to the day's start, and the online store, where the newest wins, does not.
        # The offline store is never ahead of the cursor: the pipeline refills one from the other.
        open_online(features, context.home.online(context.project), context.project).clear()
    pipeline = open_pipeline(context, features, found)
    before = pipeline.versions

    async def run() -> ReplayResult:
        async with AsyncClient(
            endpoint,
            token=os.environ.get(TOKEN_VARIABLE),
            ca_file=os.environ.get(CA_VARIABLE),
            connections=replay.concurrency + 1,
            retries=None,
        ) as client:
            replayer = Replayer(
                context.run_id,
                traffic,
                replay,
                monitoring,
                loop,
                client=client,
                pipeline=pipeline,
                monitor=RemoteMonitor(handle),
                recording=recording,
                say=lambda rows, message: context.reporter.progress(rows=rows, message=message),
            )
            return await replayer.run(endpoint.versions)

    result = asyncio.run(run())
    context.reporter.reads("deployment", endpoint.name)
    tell_versions(context, before, pipeline.versions)
    for name in ("rows", "requests", "failed_requests", "p50_ms", "p99_ms", "wall_s"):
        value = getattr(result, name)
        if value is not None:
            context.reporter.metric(name, float(value))
    return result


@effect
def report(context: Context, project: str, result: ReplayResult, monitoring: Monitoring) -> Path:
    """Write ``report.html`` and ``report.json`` of a replay; return the folder that holds both.

    They also appear in the run's folder, for people to open.
    """
    from mlops_ray.loop.report import write
    from mlops_ray.loop.summary import summarise

    document = summarise(result, _versions(context, project))
    for name, value in document["summary"].items():
        if value is not None:
            context.reporter.metric(name, float(value))
    head = {"project": project, "run_id": context.run_id}
    document = head | document | {"drift_threshold": monitoring.drift.threshold}
    folder = context.home.run(context.run_id)
    for place in (folder, folder / "report"):
        write(place, document)
    return folder / "report"


def _versions(context: Context, project: str) -> list[dict[str, Any]]:
    from mlops_ray.registry.registry import Registry

    registry = Registry(context.home)
    return [registry.describe(f"{project}@{v.version}") for v in registry.versions(project)]


def _table(tables: dict[str, pa.Table], source: str) -> pa.Table:
    if source not in tables:
        raise FeatureStoreError(
            f"the table of the label source {source!r} is not given",
            fix=f"give the step the cleaned table as tables.{source}",
        )
    return tables[source]


def _spec(
    context: Context,
    project: str,
    endpoint: Endpoint,
    monitoring: Monitoring,
    loop: Loop,
    *,
    virtual: bool,
) -> ControllerSpec:
    return ControllerSpec(
        project=project,
        home=str(context.home.root),
        endpoint=endpoint,
        monitoring=monitoring,
        loop=loop,
        retrain=_retrain_command(context, loop),
        clock="virtual" if virtual else "wall",
    )


def _retrain_command(context: Context, loop: Loop) -> JobCommand | None:
    if not context.command:
        return None
    argv = (*context.command, f"workflow={loop.workflow}", "--fresh", "--defer-mirror")
    return JobCommand(argv=argv, env=told_environment(), directory=shipped_directory())
