"""Why a step ran, came from the cache, or was skipped: its key beside that of the run before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, RunRecord
from mlops_ray.orchestration.moments import Moment, Planned, Recorded
from mlops_ray.orchestration.plan import Plan

Part = Literal["function", "code", "config", "input", "environment"]

_EARLIER_RUNS = 100
_ABSENT = "(nothing)"
_STATES = {
    "pending": "has not begun",
    "running": "is running",
    "cancelled": "was cancelled",
    "uncertain": "may or may not have happened",
}


@dataclass(frozen=True)
class Change:
    """One part of a key that is not what it was.

    ``name`` is a parameter (with a dotted path of a config value), a function or other definition,
    a package or variable. ``then`` and ``now`` are values, digests or, of code, "added" and so on.
    ``cause`` explains the step whose output an input is.
    """

    part: Part
    name: str
    then: Any
    now: Any
    cause: Explanation | None = None


@dataclass(frozen=True)
class Explanation:
    """What became of a step in a run, and what of its key differs from an earlier run."""

    step: str
    run: str
    status: str
    reason: str
    against: str | None = None
    changes: tuple[Change, ...] = ()
    wrote: tuple[str, ...] = ()

    def causes(self) -> Iterator[str]:
        """Yield in words what began it all: changes that no other step explains."""
        if not self.changes:
            yield f"{self.step}: {'; '.join((self.reason, *self.wrote))}"
        for change in self.changes:
            if change.cause is not None:
                yield from change.cause.causes()
            else:
                yield describe(change)


def describe(change: Change) -> str:
    """Say a change in one line."""
    if change.part == "code":
        return f"code {change.name} {change.now}"
    if change.part == "input":
        return f"input {change.name}: {_short(change.then)} → {_short(change.now)}"
    return f"{change.part} {change.name}: {_short(change.then)} → {_short(change.now)}"


def explain(ledger: Ledger, step: str, run: RunRecord) -> Explanation:
    """Explain a step of a run of before.

    Raises:
        WorkflowError: The run has no such step.
    """
    return _explain(Recorded(ledger, run), step, ledger, run)


def explain_plan(ledger: Ledger, step: str, plan: Plan, run: RunRecord | None) -> Explanation:
    """Explain what would become of a step now.

    Args:
        ledger: What has been.
        step: Its name.
        plan: What would happen.
        run: The newest run of the project, None where there is none.

    Raises:
        WorkflowError: The workflow has no such step.
    """
    return _explain(Planned(plan), step, ledger, run, including=True)


def last_run(ledger: Ledger, step: str, project: str | None = None) -> RunRecord | None:
    """Return the newest run in which a step of this name came to its turn."""
    for run in ledger.runs(project=project, limit=_EARLIER_RUNS):
        if any(s.name == step and s.status != "pending" for s in ledger.steps(run.run_id)):
            return run
    return None


def _explain(
    now: Moment, step: str, ledger: Ledger, run: RunRecord | None, *, including: bool = False
) -> Explanation:
    if step not in now.names():
        raise WorkflowError(
            f"there is no step {step!r}", where=now.run, fix=f"steps: {', '.join(now.names())}"
        )
    then = _before(ledger, run, step, including=including) if run is not None else None
    return _Comparison(now, then).explain(step)


def _before(ledger: Ledger, run: RunRecord, step: str, *, including: bool) -> Recorded | None:
    """Return the newest earlier run that knows what the step's key was made of; first one of the same
    workflow."""
    found: Recorded | None = None
    for other in ledger.runs(project=run.project, limit=_EARLIER_RUNS):
        earlier = other.started_at < run.started_at or (including and other.run_id == run.run_id)
        if not earlier:
            continue
        records = {record.name: record for record in ledger.steps(other.run_id)}
        key = records[step].key if step in records else None
        if key is None or ledger.key_parts(key) is None:
            continue
        if other.workflow == run.workflow:
            return Recorded(ledger, other)
        found = found or Recorded(ledger, other)
    return found


@dataclass
class _Comparison:
    """Two moments side by side. Each step is explained once."""

    now: Moment
    then: Recorded | None
    _known: dict[str, Explanation] = field(default_factory=dict)

    def explain(self, step: str) -> Explanation:
        if step not in self._known:
            self._known[step] = self._explained(step)
        return self._known[step]

    def _explained(self, step: str) -> Explanation:
        status = self.now.status(step)
        against = self.then.run if self.then is not None and step in self.then.names() else None
        changes = self._changes(step) if against is not None else ()
        reason = self._reason(step, status, against, changes)
        wrote = self._wrote(step) if against is not None else ()
        calls = self.now.calls(step)
        if calls is not None:
            reason += f" ({calls[0]:,} of {calls[1]:,} calls came from the cache)"
        return Explanation(step, self.now.run, status, reason, against, changes, wrote)

    def _reason(
        self, step: str, status: str, against: str | None, changes: tuple[Change, ...]
    ) -> str:
        said = self.now.said(step)
        if status in _STATES:
            return _STATES[status]
        if status == "skipped":
            return f"was skipped: {said}" if said else "was skipped"
        if status in ("cached", "finished", "depends"):
            return f"{_VERBS[status]}: {said}" if said else _VERBS[status]
        verb = {"failed": "failed", "run": "would run"}.get(status, "ran")
        verb = f"{verb} ({said})" if status == "failed" and said else verb
        if changes:
            return f"{verb}: what it depends on changed"
        return f"{verb}: {self._why_unchanged(step, against)}"

    def _why_unchanged(self, step: str, against: str | None) -> str:
        mode = self.now.mode(step)
        if mode == "ensure":
            return "it makes a state so, in every attempt"
        if mode == "effect":
            return "it has effects, once in each run"
        if against is None or self.then is None:
            return "it had not run before"
        if self.then.status(step) not in ("succeeded", "cached"):
            return f"nothing changed, and in run {against} it did not end"
        if isinstance(self.now, Recorded) and not self.now.corrupt(step):
            return "nothing changed; its output was no longer there, or the run began anew"
        return "nothing changed; its output was corrupt or missing"

    def _wrote(self, step: str) -> tuple[str, ...]:
        assert self.then is not None
        before = {_thing(link): link.name for link in self.then.wrote(step)}
        return tuple(
            f"wrote {link.kind} {link.name}, before {before[_thing(link)]}"
            if _thing(link) in before
            else f"wrote {link.kind} {link.name}"
            for link in self.now.wrote(step)
            if before.get(_thing(link)) != link.name
        )

    def _changes(self, step: str) -> tuple[Change, ...]:
        now = self.now.parts(step)
        then = self.then.parts(step) if self.then is not None else None
        waits = self.now.waits(step)
        if waits:
            return tuple(self._awaited(name, other, then) for name, other in waits.items())
        if now is None or then is None or self.now.key(step) == self._key_then(step):
            return ()
        return tuple(self._differences(then, now))

    def _awaited(self, name: str, step: str, then: Mapping[str, Any] | None) -> Change:
        before = _given((then or {"inputs": {}})["inputs"].get(name))
        return Change("input", name, before, "not known yet", self._cause(step))

    def _key_then(self, step: str) -> str | None:
        return self.then.key(step) if self.then is not None else None

    def _differences(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
        if then["target"] != now["target"]:
            yield Change("function", "uses", then["target"], now["target"])
        yield from _code(then["code"], now["code"])
        for name in sorted({*then["inputs"], *now["inputs"]}):
            yield from self._input(name, then["inputs"].get(name), now["inputs"].get(name))
        for path, before, after in _values(then["environment"], now["environment"], ""):
            yield Change("environment", path, before, after)

    def _input(self, name: str, then: Any, now: Any) -> Iterator[Change]:
        then = then or ({"config": _ABSENT} if "config" in (now or {}) else None)
        now = now or ({"config": _ABSENT} if "config" in (then or {}) else None)
        if then and now and "config" in then and "config" in now:
            for path, before, after in _values(then["config"], now["config"], name):
                yield Change("config", path, before, after)
            return
        before, after = _given(then), _given(now)
        if before == after:
            return
        step = (now or {}).get("step")
        cause = None
        if step is not None and then is not None and then.get("step") == step:
            cause = self._cause(step)
        yield Change("input", name, before, after, cause)

    def _cause(self, step: str) -> Explanation | None:
        if self.then is None or step not in self.now.names() or step not in self.then.names():
            return None
        found = self.explain(step)
        if found.changes or self.now.mode(step) != "pure":
            return found
        reason = "the same code and inputs gave another output: it is not deterministic"
        return Explanation(step, found.run, found.status, reason, found.against, (), found.wrote)


_VERBS = {
    "cached": "came from the cache",
    "finished": "is done already",
    "depends": "is not known yet",
}


def _code(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Change]:
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before != after:
            how = "added" if before is None else "removed" if after is None else "changed"
            yield Change("code", name, before, how)


def _values(then: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, old and new of each value that differs."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}, key=str):
            here = f"{path}.{key}" if path else str(key)
            yield from _values(then.get(key, _ABSENT), now.get(key, _ABSENT), here)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from _values(before, after, f"{path}.{index}")
    elif then != now:
        yield path, then, now


def _given(value: Any) -> Any:
    """Return what an input was, without where it came from."""
    if value is None:
        return _ABSENT
    for name in ("config", "digest", "value"):
        if name in value:
            return value[name]
    return "an endpoint or other state"


def _thing(link: Link) -> tuple[str, str]:
    return link.kind, link.name.partition("@")[0]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return f"{text[:8]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"
