"""The loop that drives a run: what may start is started, what comes back is taken in."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import pickle
import queue
import random
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from mlops_ray.errors import LeaseError, StepError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.records import StepStatus
from mlops_ray.orchestration.effects import Effects
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.lanes import Lanes
from mlops_ray.orchestration.messages import (
    CancelAsked,
    Cancelled,
    Lost,
    Mailbox,
    Message,
    Progress,
    Returned,
)
from mlops_ray.orchestration.opening import Opener
from mlops_ray.orchestration.recording import Recorder
from mlops_ray.orchestration.repair import Repair
from mlops_ray.orchestration.retries import Budgets, Cause, classify, delay_s, headline
from mlops_ray.orchestration.tasks import Crew, Ticket
from mlops_ray.orchestration.work import Work
from mlops_ray.orchestration.worker import Call, Outcome, see_log

_LONGEST_WAIT_S = 0.25
_CANCEL_GRACE_S = 3.0
_KILL_GRACE_S = 5.0


class Scheduler:
    """Drives one attempt at a run.

    Args:
        graph: The steps.
        frontier: How far the run is.
        opener: Decides what is to run.
        crew: Runs it.
        recorder: Records it.
        mailbox: Where everything that happens elsewhere arrives.
        artifacts: Where outputs are.
        effects: Knows how far those got that must not happen twice.
    """

    def __init__(
        self,
        graph: Graph,
        frontier: Frontier,
        opener: Opener,
        crew: Crew,
        recorder: Recorder,
        mailbox: Mailbox,
        artifacts: ArtifactStore,
        effects: Effects,
    ) -> None:
        self._graph = graph
        self._frontier = frontier
        self._opener = opener
        self._crew = crew
        self._recorder = recorder
        self._mailbox = mailbox
        self._artifacts = artifacts
        self._effects = effects
        self._lanes = Lanes(graph)
        self._works: dict[str, Work] = {}
        self._flying: set[Ticket] = set()
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._budgets = Budgets(lambda name: graph.step(name).retries)
        self._repair = Repair(graph, frontier, recorder, artifacts)
        self._timers: list[tuple[float, int, Work, int]] = []
        self._count = itertools.count()

    def run(self) -> None:
        """Run until all steps are over.

        Raises:
            StepError: A step failed for good.
            WorkflowError: Nobody knows whether an effect happened.
            LeaseError: The run belongs to somebody else by now.
            Cancelled: Somebody asked for the end.
        """
        while not self._frontier.is_over:
            while names := self._frontier.take():
                self._open(names)
            for work in self._lanes.startable(self._crew.cpus):
                self._submit(work)
            self._recorder.notify()
            if not self._frontier.is_over:
                self._receive()

    # Starting

    def _open(self, names: list[str]) -> None:
        opened = self._opener.open(names)
        for name, digest in opened.unreadable.items():
            self._pay(name, -1, self._repair.error(name, digest))
            self._repair.reopen(name, {digest})
        for work in opened.works:
            self._begin(work)

    def _begin(self, work: Work) -> None:
        self._works[work.name] = work
        for item, record in work.earlier.items():
            self._attempts[work.name, item] = max(self._attempts[work.name, item], record.attempt)
        if work.is_mapped:
            self._record_start(work, -1)
        if work.once:
            self._take_up(work)
        if work.is_over:
            self._complete(work)
        elif work.waiting:
            self._lanes.add(work)

    def _take_up(self, work: Work) -> None:
        """Wait for effects that an earlier attempt has begun; stop where one's fate is not known."""
        for item in list(work.waiting):
            standing = self._effects.before(work.name, item)
            if standing is not None:
                self._attempts[work.name, item] = standing.attempt
            attempt = self._attempts[work.name, item]
            call = Call(item, attempt, work.elements_of(item))
            if standing is None or standing.over:
                if attempt:
                    self._crew.dismiss(work.name, call)
                continue
            ticket = Ticket(work.name, (call,), once=True, stale=work.is_stale(item))
            if not self._crew.attach(ticket, work.step, work.job):
                raise self._effects.uncertain(work.name, item, attempt)
            work.waiting.remove(item)
            self._recorder.event("effect_taken_up", work.name, item, attempt=call.attempt)
            self._enter(ticket, work)

    def _submit(self, work: Work) -> None:
        items = [work.waiting.popleft() for _ in range(work.batch(self._crew.cpus))]
        calls = []
        for item in items:
            self._attempts[work.name, item] += 1
            attempt = self._attempts[work.name, item]
            self._record_start(work, item, attempt=attempt)
            trace = self._recorder.traceparent(work.name, item)
            calls.append(Call(item, attempt, work.elements_of(item), trace))
        ticket = Ticket(work.name, tuple(calls), once=work.once)
        if work.once:
            # From here on the effect's own actor records it: nothing of ours may come after that.
            self._recorder.flush()
        self._crew.submit(ticket, work.step, work.job)
        self._enter(ticket, work)

    def _enter(self, ticket: Ticket, work: Work) -> None:
        self._flying.add(ticket)
        self._lanes.enter(work)

    def _record_start(self, work: Work, item: int, **attempt: int) -> None:
        progress = work.progress if work.is_mapped and item < 0 else None
        message = work.lacks or progress
        self._recorder.started(work.name, item, work.key_of(item), message, **attempt)

    # Taking in

    def _receive(self) -> None:
        wait_s = _LONGEST_WAIT_S
        if self._timers:
            wait_s = min(wait_s, max(0.001, self._timers[0][0] - time.monotonic()))
        try:
            self._handle(self._mailbox.get(timeout=wait_s))
            while True:
                self._handle(self._mailbox.get_nowait())
        except queue.Empty:
            pass
        while self._timers and self._timers[0][0] <= time.monotonic():
            _, _, work, item = heapq.heappop(self._timers)
            self._wait_again(work, item)

    def _wait_again(self, work: Work, item: int) -> None:
        if not work.suspended:
            work.waiting.append(item)
            self._lanes.add(work)

    def _handle(self, message: Message) -> None:
        match message:
            case Returned(ticket, answer):
                self._take_in(ticket, answer)
            case Progress(steps):
                for name, (rows, text) in steps.items():
                    self._recorder.show(name, rows, text)
            case Lost(error):
                raise error
            case CancelAsked(by):
                raise Cancelled(by)

    def _take_in(self, ticket: Ticket, answer: Any) -> None:
        work = self._works[ticket.step]
        self._flying.discard(ticket)
        self._lanes.leave(work)
        if isinstance(answer, BaseException):
            self._crew.release(ticket, failed=True)
            self._crashed(work, ticket, answer)
        else:
            outcomes = zip(ticket.calls, pickle.loads(answer), strict=True)
            self._ended(work, ticket, list(outcomes))
            self._crew.release(ticket, failed=False)
        if work.suspended and not work.running:
            self._dismiss(work)

    def _ended(self, work: Work, ticket: Ticket, outcomes: list[tuple[Call, Outcome]]) -> None:
        """Take in the calls of a ticket: first those that succeeded, then all that failed."""
        errors = []
        for call, outcome in sorted(outcomes, key=lambda pair: pair[1].output is None):
            if ticket.stale:
                self._again(work, call, happened=outcome.output is not None)
                continue
            try:
                self._returned(work, call, outcome)
            except StepError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _again(self, work: Work, call: Call, *, happened: bool) -> None:
        """Let an effect happen again that was begun with another key, if somebody wants it to."""
        if happened and work.unasked:
            key = work.key_of(call.item).key
            raise self._effects.remade(work.name, call.item, key)
        self._wait_again(work, call.item)

    def _returned(self, work: Work, call: Call, outcome: Outcome) -> None:
        if outcome.output is not None:
            self._record_success(work, call, outcome)
            work.took((outcome.ended_at - outcome.started_at).total_seconds())
            self._entered(work, call.item, outcome.output)
            return
        assert outcome.error is not None
        if outcome.digest is not None and self._repair.makers(work.name, outcome.digest):
            self._suspend(work, call, outcome.digest, outcome.error)
        else:
            self._failed(work, call, outcome.error, outcome.cause, outcome.node)

    def _entered(self, work: Work, item: int, output: ArtifactRef) -> None:
        work.returned(item, output)
        if work.is_over:
            self._complete(work)
        elif work.is_mapped:
            self._recorder.message(work.name, work.progress)

    def _record_success(self, work: Work, call: Call, outcome: Outcome) -> None:
        said = {"attempt": call.attempt, "node": outcome.node}
        self._recorder.set(work.name, "succeeded", item=call.item, said=said, **outcome.facts)
        if outcome.links:
            self._recorder.write(*outcome.links)

    def _complete(self, work: Work) -> None:
        if work.is_mapped:
            output = self._artifacts.put_list(work.outputs)
            self._recorder.set(
                work.name,
                "succeeded",
                output=output,
                ended_at=datetime.now(UTC),
                rows=output.rows,
                message=work.progress,
            )
        else:
            (output,) = work.outputs
        del self._works[work.name]
        self._frontier.finish(work.name, output)

    # What goes wrong

    def _crashed(self, work: Work, ticket: Ticket, error: BaseException) -> None:
        """Take in that nobody has answered for calls: their process, their node, or Ray is gone."""
        raised = getattr(error, "cause", None)
        if isinstance(raised, LeaseError):
            raise raised
        if len(ticket.calls) > 1:
            self._suspect(work, ticket, headline(error))
            return
        (call,) = ticket.calls
        done = self._effects.record_of(work, call) if work.once else None
        if done is not None and ticket.stale:
            self._again(work, call, happened=True)
            return
        if done is not None and done.output is not None:
            self._recorder.keep(done)
            self._entered(work, call.item, done.output)
            return
        what, cause = headline(error), classify(raised or error)
        limit = work.step.timeout
        if limit is not None and self._crew.is_struck(ticket):
            what, cause = f"it took longer than {limit}, and did not end when interrupted", "user"
        where, run_id = f"step {work.name}", self._recorder.run.run_id
        if call.item >= 0:
            where = f"{where}, call {call.item}"
        fix = see_log(run_id, work.name, call.item)
        failure = StepError(what, step=work.name, run_id=run_id, where=where, fix=fix)
        self._failed(work, call, failure, cause, None)

    def _suspect(self, work: Work, ticket: Ticket, reason: str) -> None:
        """Let the calls of a batch that crashed run one by one: one of them may have done it."""
        items = [call.item for call in ticket.calls]
        self._recorder.event("batch_crashed", work.name, calls=items, reason=reason)
        work.suspects.update(items)
        for item in items:
            self._recorder.set(work.name, "pending", item=item)
            self._wait_again(work, item)

    def _failed(
        self, work: Work, call: Call, error: StepError, cause: Cause, node: str | None
    ) -> None:
        said = {"attempt": call.attempt, "cause": cause, "node": node, "reason": error.what}
        tries = self._budgets.spend(work.name, call.item, cause)
        if tries is None:
            self._give_up(work, call.item, error, said)
        wait_s = delay_s(work.step.retries.backoff, tries or 1, random.random())
        self._recorder.retry(work.name, call.item, error.what, said | {"delay_s": round(wait_s, 3)})
        entry = (time.monotonic() + wait_s, next(self._count), work, call.item)
        heapq.heappush(self._timers, entry)

    def _give_up(self, work: Work, item: int, error: StepError, said: dict[str, Any]) -> None:
        self._recorder.failed(work.name, item, error.what, said)
        raise error

    def _suspend(self, work: Work, call: Call, digest: str, error: StepError) -> None:
        """An input of a step is gone: what has made it runs again, and then the step."""
        self._pay(work.name, call.item, error)
        work.suspended = True
        work.waiting.clear()
        self._lanes.drop(work)
        work.lost.add(digest)

    def _dismiss(self, work: Work) -> None:
        self._recorder.flush()  # so that the calls that are done are found when it is opened again
        del self._works[work.name]
        self._repair.reopen(work.name, work.lost)

    def _pay(self, name: str, item: int, error: StepError) -> None:
        """Pay for another try at reading what is lost."""
        if self._budgets.spend(name, item, "infrastructure") is None:
            self._recorder.set(name, "failed", error=error.what, message=error.what)
            raise error

    # Stopping

    def stop(self, status: StepStatus, *, record: bool, effects_too: bool) -> None:
        """Cancel what runs, give it a moment to end, then end it.

        Args:
            status: What becomes of the steps that were cut off.
            record: Whether to record anything; not where the lease is lost.
            effects_too: Whether effects that must not run twice are ended as well. They outlive us
                otherwise, and the next attempt waits for them.
        """
        ours = {ticket for ticket in self._flying if effects_too or not ticket.once}
        done: list[tuple[Work, Call, Outcome]] = []
        for force, grace_s in ((False, _CANCEL_GRACE_S), (True, _KILL_GRACE_S)):
            with contextlib.suppress(KeyboardInterrupt):  # asked again: it is not waited for longer
                for ticket in ours & self._flying:
                    self._crew.cancel(ticket, force=force or ticket.once)
                until_s = time.monotonic() + grace_s
                while ours & self._flying and (left_s := until_s - time.monotonic()) > 0:
                    done += self._last_successes(left_s)
        if record:
            for work, call, outcome in done:
                self._record_success(work, call, outcome)
            calls = {(ticket.step, call.item) for ticket in ours for call in ticket.calls}
            calls |= {(work.name, item) for _, _, work, item in self._timers}
            calls -= {(work.name, call.item) for work, call, _ in done}
            left = {ticket.step for ticket in self._flying if ticket.once}
            self._recorder.cut_off(status, calls, left)

    def _last_successes(self, patience_s: float) -> list[tuple[Work, Call, Outcome]]:
        try:
            message = self._mailbox.get(timeout=patience_s)
        except queue.Empty:
            return []
        if not isinstance(message, Returned):
            return []
        ticket = message.ticket
        self._flying.discard(ticket)
        if isinstance(message.answer, BaseException) or ticket.stale:
            return []
        work = self._works[ticket.step]
        outcomes = zip(ticket.calls, pickle.loads(message.answer), strict=True)
        return [(work, call, outcome) for call, outcome in outcomes if outcome.output is not None]
