"""Any sequence of writes gives what a plain dictionary gives: on every ledger."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from contract.ledgers import Ledgers, run_record
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mlops_ray.errors import LeaseError
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Firing, Lease, Link, NewEvent, NewKey, StepChange, StepRecord

START = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = st.sampled_from(["a", "b", "inner/a"])
ITEMS = st.sampled_from([-1, 0, 1])
KEYS = st.sampled_from(["k1", "k2"])
MOMENTS = st.integers(0, 4).map(lambda n: START + timedelta(microseconds=n))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
JSON = st.dictionaries(TEXT, st.none() | st.integers() | st.floats(allow_nan=False) | TEXT)
REFS = st.builds(
    ArtifactRef,
    digest=st.sampled_from(["1" * 64, "2" * 64]),
    kind=st.just("json"),
    size=st.integers(0, 9),
    rows=st.none(),
)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["running", "succeeded", "cached", "failed"]),
        "key": KEYS,
        "output": REFS,
        "ended_at": MOMENTS,
        "rows": st.integers(0, 2**40),
        "message": TEXT | st.none(),
        "attempt": st.integers(0, 3),
        "metrics": st.dictionaries(TEXT, st.floats(allow_nan=False)),
        "params": JSON,
    },
)


class Machine(RuleBasedStateMachine):
    """The ledger beside a dictionary. Each has names of its own, so that one ledger serves many."""

    ledger: Ledger
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.own = uuid.uuid4().hex[:12]
        self.steps: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.keys: dict[str, Any] = {}
        self.links: set[tuple[str, str]] = set()
        self.held: Lease | None = None
        self.tokens = 0
        self.fired: dict[str, Firing] = {}

    @initialize(target=leases)
    def begin(self) -> Lease:
        self.run = f"{self.own}-run"
        record = run_record(self.run, project=self.own)
        self.ledger.start_run(record, ["a", "b"])
        for position, name in enumerate(("a", "b")):
            self.steps[self.run, name, -1] = {"status": "pending", "position": position}
        return self.take("first", 600, dead=None)

    @rule(
        changes=st.lists(st.tuples(NAMES, ITEMS, VALUES), max_size=6),
        facts=st.lists(JSON, max_size=2),
        key=st.none() | st.tuples(KEYS, JSON),
        link=st.none() | st.sampled_from(["v@1", "v@2"]),
        lease=st.none() | leases,
    )
    def apply(self, changes: Any, facts: Any, key: Any, link: Any, lease: Lease | None) -> None:
        writes: list[Any] = [NewEvent(project=self.own, kind="fact", data=data) for data in facts]
        for name, item, values in changes:
            given = values | ({"key": self.own + values["key"]} if "key" in values else {})
            writes.append(StepChange(run_id=self.run, name=name, item=item, values=given))
        if key is not None:
            writes.append(NewKey(key=self.own + key[0], parts=key[1]))
        if link is not None:
            given = {"run_id": self.run, "step": "a", "direction": "reads", "kind": "view"}
            writes.append(Link(name=link, **given))
        if lease is not None and lease.token != self.tokens:
            with pytest.raises(LeaseError):
                self.ledger.apply(writes, fence=lease)
            return
        self.ledger.apply(writes, fence=lease)
        for change in (write for write in writes if isinstance(write, StepChange)):
            known = self.steps.setdefault((self.run, change.name, change.item), {})
            known.update(change.values)
        self.events += facts
        if key is not None:
            self.keys.setdefault(self.own + key[0], key[1])
        if link is not None:
            self.links.add(("reads", link))

    @rule(
        target=leases,
        owner=st.sampled_from(["me", "you"]),
        ttl_s=st.sampled_from([-5, 600]),
        dead=st.none() | leases,
    )
    def take(self, owner: str, ttl_s: float, dead: Lease | None) -> Lease:
        name = f"{self.own}-lease"
        held = self.held
        free = held is None or held.expires_at < datetime.now(UTC) or held.owner == owner
        known_dead = dead is not None and dead.token == self.tokens
        if held is not None and not free and not known_dead:
            with pytest.raises(LeaseError) as refused:
                self.ledger.acquire(name, owner, ttl_s, dead=dead)
            assert refused.value.lease == held
            return held
        self.tokens += 1
        self.held = self.ledger.acquire(name, owner, ttl_s, dead=dead)
        assert (self.held.owner, self.held.token) == (owner, self.tokens)
        return self.held

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if lease.token != self.tokens:
            with pytest.raises(LeaseError):
                self.ledger.renew(lease, 600)
        else:
            self.held = self.ledger.renew(lease, 600)

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.ledger.release(lease)
        if lease.token == self.tokens:
            self.held = self.ledger.lease(lease.name)
            assert self.held is not None
            assert self.held.expires_at <= datetime.now(UTC)

    @rule(name=st.sampled_from(["x", "y"]), at=MOMENTS, data=JSON)
    def fire(self, name: str, at: datetime, data: Any) -> None:
        key = f"{self.own}-{name}"
        given = {"project": self.own, "trigger": name, "status": "due"}
        firing = Firing(key=key, at=at, data=data, **given)
        assert self.ledger.fire(firing) == (key not in self.fired)
        self.fired.setdefault(key, firing)

    @rule(name=st.sampled_from(["x", "y"]), attempt=st.integers(0, 3))
    def update_firing(self, name: str, attempt: int) -> None:
        key = f"{self.own}-{name}"
        self.ledger.update_firing(key, status="failed", attempt=attempt)
        if key in self.fired:
            changed = {"status": "failed", "attempt": attempt}
            self.fired[key] = self.fired[key].model_copy(update=changed)

    @invariant()
    def steps_are_as_written(self) -> None:
        if not self.steps:
            return
        found = list(self.ledger.steps(self.run))
        for name in ("a", "b", "inner/a"):
            found += self.ledger.items(self.run, name)
        assert {(step.run_id, step.name, step.item): step for step in found} == self._records()

    @invariant()
    def cached_is_the_newest(self) -> None:
        done = [s for s in self._records().values() if s.status in ("succeeded", "cached")]
        best: dict[str, StepRecord] = {}
        never = datetime.min.replace(tzinfo=UTC)
        for step in sorted(done, key=lambda s: (s.ended_at or never, s.item)):
            if step.key is not None:
                best[step.key] = step
        found = self.ledger.cached([self.own + "k1", self.own + "k2"])
        assert {key: (s.ended_at, s.item) for key, s in found.items()} == {
            key: (s.ended_at, s.item) for key, s in best.items()
        }

    @invariant()
    def the_rest_is_as_written(self) -> None:
        assert [event.data for event in self.ledger.events(project=self.own)] == self.events
        for key in ("k1", "k2"):
            assert self.ledger.key_parts(self.own + key) == self.keys.get(self.own + key)
        assert self.ledger.lease(f"{self.own}-lease") == self.held
        expected = sorted(self.fired.values(), key=lambda firing: firing.key)
        expected.sort(key=lambda firing: firing.at, reverse=True)
        assert self.ledger.firings(project=self.own) == expected
        if self.steps:
            links = self.ledger.links(run_id=self.run)
            assert {(link.direction, link.name) for link in links} == self.links

    def _records(self) -> dict[tuple[str, str, int], StepRecord]:
        default = {"status": "pending", "position": 0}
        return {
            identity: StepRecord(
                run_id=identity[0], name=identity[1], item=identity[2], **(default | values)
            )
            for identity, values in self.steps.items()
        }


def test_any_sequence_of_writes_gives_what_a_dictionary_gives(ledgers: Ledgers) -> None:
    class Bound(Machine):
        ledger = ledgers.open()

    run_state_machine_as_test(
        Bound,
        settings=settings(
            max_examples=12,
            stateful_step_count=15,
            deadline=None,
            # Making a failing sequence shorter would take minutes on a database.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
