"""Running a workflow: owned by one process at a time, taken up where it was left."""

from __future__ import annotations

import contextlib
import secrets
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.errors import LeaseError, LedgerError, WorkflowError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.belonging import claim
from mlops_ray.metadata.journal import Journal
from mlops_ray.metadata.provenance import collect
from mlops_ray.metadata.records import Lease, RunRecord, RunStatus, StepRecord, StepStatus
from mlops_ray.orchestration import once
from mlops_ray.orchestration.cancellation import CANCEL
from mlops_ray.orchestration.effects import Effects
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph, build
from mlops_ray.orchestration.messages import (
    CancelAsked,
    Cancelled,
    Lost,
    Mailbox,
    Progress,
    Returned,
)
from mlops_ray.orchestration.opening import Opener
from mlops_ray.orchestration.ownership import Keeper, take
from mlops_ray.orchestration.plan import unfinished_run
from mlops_ray.orchestration.recording import Listener, Recorder
from mlops_ray.orchestration.restriction import restrict
from mlops_ray.orchestration.reuse import DONE
from mlops_ray.orchestration.scheduler import Scheduler
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.tasks import Crew
from mlops_ray.orchestration.tracing import open_trace
from mlops_ray.orchestration.triggers import note_firing


class Executor:
    """Runs a workflow on the Ray that this process is connected to.

    Args:
        spec: What to run.
        listener: Called about four times a second with the run and its steps.
    """

    def __init__(self, spec: RunSpec, *, listener: Listener | None = None) -> None:
        self._spec = spec
        self._listener = listener
        self._graph: Graph = restrict(build(spec.workflow), spec.only, spec.given)
        self._ledger = open_ledger(spec.home)
        self._artifacts = open_artifacts(spec.home)
        self._heard = 0
        """The last event that asked an earlier attempt at the run to end."""

    def run(self, *, fresh: bool = False) -> RunRecord:
        """Run to the end, taking up an unfinished run of the same workflow and configuration.

        Its effects are not repeated while their code and inputs are the same; what is pure comes
        from the cache. ``fresh`` starts a new run in any case.

        Raises:
            StepError: A step failed. What was finished stays; the same call goes on from there.
            WorkflowError: Another process is running this very workflow and configuration, somebody
                cancelled it, or it cannot be known whether an effect happened.
            LeaseError: Another process has taken the run over.
        """
        lease = take(self._ledger, self._spec.instance)
        try:
            run, earlier = self._begin(lease, fresh)
            return self._drive(run, earlier, lease)
        finally:
            with contextlib.suppress(LedgerError):
                self._ledger.release(lease)

    def output(self, run_id: str, step: str) -> Any:
        """Return the output of a finished step of a run."""
        for record in self._ledger.steps(run_id):
            if record.name == step and record.output is not None:
                return self._artifacts.get(record.output)
        raise WorkflowError(f"step {step!r} of run {run_id} has no output")

    def steps(self, run_id: str) -> list[StepRecord]:
        """Return the steps of a run."""
        return self._ledger.steps(run_id)

    # Beginning

    def _begin(self, lease: Lease, fresh: bool) -> tuple[RunRecord, dict[str, StepRecord]]:
        self._heard = 0
        previous = unfinished_run(self._spec, self._ledger)
        if previous is not None and not fresh:
            return self._resume(previous, lease)
        if previous is not None and previous.status == "running":
            self._ledger.finish_run(previous.run_id, "interrupted", fence=lease)
        record = RunRecord(
            run_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            project=self._spec.project,
            workflow=self._spec.workflow.name,
            status="running",
            config_digest=self._spec.instance_digest,
            started_at=datetime.now(UTC),
            ended_at=None,
            owner=lease.owner,
            config=self._spec.config,
            provenance={},
            reason=self._spec.reason,
        )
        self._ledger.start_run(record, self._graph.order)
        return record, {}

    def _resume(self, previous: RunRecord, lease: Lease) -> tuple[RunRecord, dict[str, StepRecord]]:
        asked = self._ledger.events(run_id=previous.run_id, kind=CANCEL)
        self._heard = asked[-1].id if asked else 0
        provenance = previous.provenance
        self._ledger.resume_run(previous.run_id, lease.owner, provenance, fence=lease)
        update = {"status": "running", "owner": lease.owner, "ended_at": None}
        earlier = {step.name: step for step in self._ledger.steps(previous.run_id)}
        return previous.model_copy(update=update), earlier

    def _keep_provenance(self, run_id: str, lease: Lease) -> dict[str, Any]:
        spec = self._spec
        claim(self._artifacts, run_id)
        found = collect(spec.directory, spec.config_digest, spec.seed, self._artifacts)
        self._ledger.resume_run(run_id, lease.owner, found, fence=lease)
        return found

    # Running

    def _drive(self, run: RunRecord, earlier: dict[str, StepRecord], lease: Lease) -> RunRecord:
        mailbox = Mailbox()
        journal = Journal(self._ledger.apply, lease)
        trace = open_trace(run)
        recorder = Recorder(
            run,
            self._records(run, earlier),
            journal,
            needs=self._graph.needs,
            trace=trace,
            listener=self._listener,
        )
        crew = Crew(
            run.project,
            run.run_id,
            self._groups(),
            self._spec.home,
            lambda ticket, answer: mailbox.put(Returned(ticket, answer)),
        )
        scheduler = self._scheduler(recorder, crew, mailbox, lease, earlier)
        watch = _Watch(self, run.run_id, mailbox, shows=self._listener is not None)
        keeper = Keeper(
            self._ledger, lease, lost=lambda error: mailbox.put(Lost(error)), look=watch.look
        )
        # It takes about as long as some tens of small steps; they need not wait for it.
        aside = ThreadPoolExecutor(1, thread_name_prefix="provenance")
        provenance = aside.submit(self._keep_provenance, run.run_id, lease)
        try:
            self._announce(recorder, earlier)
            scheduler.run()
            recorder.flush()
            recorder.keep_provenance(provenance.result())
            self._finish(recorder, "succeeded", lease)
        except BaseException as error:
            aside.shutdown()
            self._stop(scheduler, recorder, error, lease)
            if isinstance(error, Cancelled):
                raise WorkflowError(f"run {run.run_id} was cancelled", why=str(error)) from None
            raise
        finally:
            aside.shutdown()
            keeper.close()
            journal.close()
            crew.close()
            if trace is not None:
                trace.close(recorder.run.status)
        return recorder.run

    def _scheduler(
        self,
        recorder: Recorder,
        crew: Crew,
        mailbox: Mailbox,
        lease: Lease,
        earlier: dict[str, StepRecord],
    ) -> Scheduler:
        graph, ledger, artifacts = self._graph, self._ledger, self._artifacts
        frontier = Frontier(graph, self._spec.given)
        standings = once.standings_in(ledger, recorder.run.run_id) if earlier else {}
        effects = Effects(ledger, recorder, standings)
        opener = Opener(
            self._spec, graph, frontier, recorder, ledger, artifacts, lease, earlier, effects
        )
        return Scheduler(graph, frontier, opener, crew, recorder, mailbox, artifacts, effects)

    def _announce(self, recorder: Recorder, earlier: dict[str, StepRecord]) -> None:
        recorder.event("run_resumed" if earlier else "run_started", reason=self._spec.reason)
        note_firing(self._ledger, self._spec.project, recorder.run.run_id)
        for name, output in self._spec.given.items():
            if name in self._graph.order:
                recorder.set(name, "cached", output=output, message="given")
        for record in earlier.values():
            left = record.status not in (*DONE, "pending", "uncertain")
            if left and record.name not in self._spec.given:
                recorder.forget(record.name)

    def _finish(self, recorder: Recorder, status: RunStatus, lease: Lease, why: str = "") -> None:
        said: dict[str, Any] = {"reason": why} if why else {}
        recorder.event(f"run_{status}", **said)
        recorder.flush()
        self._ledger.finish_run(recorder.run.run_id, status, fence=lease)
        recorder.end(status)
        recorder.notify(force=True)

    def _stop(
        self, scheduler: Scheduler, recorder: Recorder, error: BaseException, lease: Lease
    ) -> None:
        """End what runs and record how far the run got, as far as the ledger lets us."""
        cancelled = isinstance(error, Cancelled)
        step_status: StepStatus = "cancelled" if cancelled else "pending"
        ours = not isinstance(error, LeaseError)
        status: RunStatus = "failed" if isinstance(error, Exception) else "interrupted"
        with contextlib.suppress(KeyboardInterrupt, Exception):
            scheduler.stop(step_status, record=ours, effects_too=cancelled)
        if ours:
            status = "cancelled" if cancelled else status
            try:
                self._finish(recorder, status, lease, str(error))
            except LedgerError:
                pass
            except Exception:  # something could not be written; the end still can
                with contextlib.suppress(LedgerError):
                    self._ledger.finish_run(recorder.run.run_id, status, fence=lease)

    def _records(self, run: RunRecord, earlier: dict[str, StepRecord]) -> list[StepRecord]:
        return [
            earlier.get(name)
            or StepRecord(run_id=run.run_id, name=name, position=position, status="pending")
            for position, name in enumerate(self._graph.order)
        ]

    def _groups(self) -> dict[str, list[Step]]:
        groups: dict[str, list[Step]] = defaultdict(list)
        for name in self._graph.order:
            step = self._graph.step(name)
            if step.group is not None:
                groups[step.group].append(step)
        return groups


class _Watch:
    """Looks into the ledger beside the loop: has somebody asked for the end, what do steps say?"""

    def __init__(self, executor: Executor, run_id: str, mailbox: Mailbox, *, shows: bool) -> None:
        self._ledger = executor._ledger
        self._run_id = run_id
        self._mailbox = mailbox
        self._shows = shows
        self._seen = executor._heard

    def look(self) -> None:
        """Post what is new."""
        for event in self._ledger.events(run_id=self._run_id, kind=CANCEL, after=self._seen):
            self._seen = event.id
            self._mailbox.put(CancelAsked(str(event.data.get("by", "somebody"))))
        if self._shows:
            steps = self._ledger.steps(self._run_id)
            said = {s.name: (s.rows, s.message) for s in steps if s.status == "running"}
            self._mailbox.put(Progress(said))
