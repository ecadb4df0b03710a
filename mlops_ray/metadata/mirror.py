"""The MLflow mirror: each run of a workflow a parent run, each of its steps a child run.

The ledger is the truth; this is a view of it for people who use MLflow's pages and client. A run is
mirrored once it is over. What was cut off, by a kill or by an outage of MLflow, the next call goes on
with: every MLflow run carries the name of what it shows, a digest of it, and, last of all, the mark
that it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from mlops_ray.errors import ArtifactError
from mlops_ray.metadata import tracking
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore, open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import MIRRORED, RunRecord, StepRecord
from mlops_ray.metadata.rows import cell
from mlops_ray.metadata.tracking_view import (
    DONE_TAG,
    RUN_TAG,
    STATE_TAG,
    STEP_TAG,
    Dataset,
    Shown,
    arrow_schema,
    show_run,
    show_step,
)

_PARENT_TAG = "mlflow.parentRunId"
_CONTEXT_TAG = "mlflow.data.context"
_THREADS = 4
_PER_BATCH = 100
_MOST_METRICS = 500
_PAGE = 1000


def mirror(home: Home) -> int:
    """Write every run that is over and not in MLflow yet, with its steps; return how many.

    Raises:
        MlopsRayError: MLflow cannot be reached. The next call goes on.
        mlflow.exceptions.MlflowException: MLflow refuses a run, and the others are written; or it
            fails. The next call goes on.
    """
    ledger = open_ledger(home)
    if not ledger.unmirrored():
        return 0
    client = tracking.connect(home)
    # Two processes that look for the same run at the same time would both make it.
    with tracking.locked(home, "mirror"):
        pending = ledger.unmirrored()
        refusals = []
        for run in pending:
            try:
                _Mirror(client, home, ledger, open_artifacts(home)).write(run)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                refusals.append(error)
                continue
            # A run that has been resumed meanwhile will end at another time.
            shown = {"status": run.status, "ended_at": cell(run.ended_at)}
            ledger.append(run.project, MIRRORED, shown, run_id=run.run_id)
    if refusals:
        raise refusals[0]
    return len(pending)


def _is_refusal(error: Exception) -> bool:
    """Say whether MLflow does not take what a run shows, whereas others may be good."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


@dataclass
class _Mirror:
    """Writes runs to one MLflow."""

    client: Any
    home: Home
    ledger: Any
    artifacts: ArtifactStore
    datasets: Lock = field(default_factory=Lock)

    def write(self, run: RunRecord) -> None:
        """Make MLflow show this run as it is, whatever it shows of it now."""
        experiment = tracking.experiment(self.client, self.home, run.project)
        steps = self.ledger.steps(run.run_id)
        there = self._there(experiment, run.run_id)
        whole = show_run(run, steps, str(self.home.run(run.run_id)))
        parent, complete = self._begin(experiment, there, "", whole, {})
        shown = list(self._show_steps(run, steps))

        def write_step(one: Shown) -> None:
            tags = {_PARENT_TAG: parent}
            run_id, complete = self._begin(experiment, there, one.tags[STEP_TAG], one, tags)
            if not complete:
                self._fill(run_id, one)

        # A file of SQLite takes one writer at a time.
        with ThreadPoolExecutor(_THREADS if self.home.storage.tracking else 1) as pool:
            futures = [pool.submit(write_step, one) for one in shown]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                # Where MLflow is down, the others would wait for it in turn.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if not complete:
            self.client.log_dict(parent, run.config, "config.json")
            self._fill(parent, whole)
        self._remove_doubles(experiment, run.run_id, {"", *(one.name for one in shown)})

    def _there(self, experiment: str, run_id: str) -> dict[str, list[Any]]:
        """Return what MLflow has of a run by the step's name, complete ones first."""
        query = f"tags.`{RUN_TAG}` = '{run_id}'"
        found: dict[str, list[Any]] = {}
        token = None
        while True:
            page = self.client.search_runs([experiment], query, max_results=_PAGE, page_token=token)
            for made in page:
                found.setdefault(made.data.tags[STEP_TAG], []).append(made)
            token = page.token
            if not token:
                break
        for made in found.values():
            made.sort(key=lambda one: (DONE_TAG not in one.data.tags, one.info.run_id))
        return found

    def _begin(
        self,
        experiment: str,
        there: dict[str, list[Any]],
        step: str,
        shown: Shown,
        more: dict[str, str],
    ) -> tuple[str, bool]:
        """Find or make the MLflow run; say whether it shows all already."""
        for made in there.get(step, []):
            if made.data.tags.get(STATE_TAG) == shown.state:
                return str(made.info.run_id), DONE_TAG in made.data.tags
        for made in there.get(step, []):
            if not step:
                # The children name their parent: a run that was resumed keeps it.
                return str(made.info.run_id), False
            # Parameters in MLflow cannot change.
            self.client.delete_run(made.info.run_id)
        made = self.client.create_run(
            experiment,
            start_time=shown.started_ms,
            tags=shown.tags | {STATE_TAG: shown.state} | more,
            run_name=shown.name,
        )
        return str(made.info.run_id), False

    def _fill(self, run_id: str, shown: Shown) -> None:
        """Write what a run shows; each call can be repeated. The mark that it is done comes last."""
        from mlflow.entities import Metric, Param, RunTag

        if shown.datasets:
            inputs = [_dataset_input(one) for one in shown.datasets]
            # MLflow fails where two requests bring the same new dataset at the same time.
            with self.datasets:
                self.client.log_inputs(run_id, inputs)
        params = [Param(name, value) for name, value in shown.params.items()]
        while len(params) > _PER_BATCH:
            self.client.log_batch(run_id, params=params[:_PER_BATCH])
            del params[:_PER_BATCH]
        self.client.set_terminated(run_id, shown.status, shown.ended_ms)
        metrics = [Metric(name, v, shown.ended_ms, 0) for name, v in shown.metrics.items()]
        tags = shown.tags | {STATE_TAG: shown.state, DONE_TAG: "yes"}
        self.client.log_batch(
            run_id,
            metrics=metrics[:_MOST_METRICS],
            params=params,
            tags=[RunTag(name, v) for name, v in tags.items()],
        )

    def _remove_doubles(self, experiment: str, run_id: str, wanted: set[str]) -> None:
        """Delete what a process that was killed had asked for, if it came in after our look."""
        for step, made in self._there(experiment, run_id).items():
            for one in made[1:] if step in wanted else made:
                self.client.delete_run(one.info.run_id)

    def _show_steps(self, run: RunRecord, steps: list[StepRecord]) -> Iterator[Shown]:
        outputs = {step.name: step.output for step in steps if step.output is not None}
        links = self.ledger.links(run_id=run.run_id)
        for step in steps:
            parts = self.ledger.key_parts(step.key) if step.key else None
            shown = show_step(
                run,
                step,
                parts,
                [link for link in links if link.step == step.name],
                self.ledger.items(run.run_id, step.name),
                tuple(self._datasets(step, parts or {}, outputs)),
                str(self.home.run(run.run_id) / "logs" / f"{step.name}.log"),
            )
            if shown is not None:
                yield shown

    def _datasets(
        self, step: StepRecord, parts: dict[str, Any], outputs: dict[str, ArtifactRef]
    ) -> Iterator[Dataset]:
        for part in (parts.get("inputs") or {}).values():
            read = part.get("digest") if isinstance(part, dict) else None
            # A key may have been made in another workflow, where that step has another name.
            named = [name for name, ref in outputs.items() if ref.digest == read]
            source = part["step"] if read and part["step"] in named else next(iter(named), None)
            if source and outputs[source].kind == "table":
                yield self._dataset(source, "input", outputs[source])
        if step.output is not None and step.output.kind == "table":
            yield self._dataset(step.name, "output", step.output)

    def _dataset(self, name: str, use: str, ref: ArtifactRef) -> Dataset:
        path = self.artifacts.path(ref.digest)
        schema = ""
        # A table that lies in a bucket only is not worth a download.
        if path.exists():
            with suppress(ArtifactError):
                schema = arrow_schema(self.artifacts.get(ref).schema)
        return Dataset(name, use, ref, str(path), schema)


def _dataset_input(shown: Dataset) -> Any:
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    entity = Entity(
        name=shown.name,
        digest=shown.digest,
        source_type="local",
        source=json.dumps({"uri": shown.where}),
        schema=shown.schema or None,
        profile=json.dumps({"num_rows": shown.ref.rows}),
    )
    return DatasetInput(entity, [InputTag(_CONTEXT_TAG, shown.use)])
