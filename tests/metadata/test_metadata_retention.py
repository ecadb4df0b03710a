"""Retention: what a pin needs is never collected, everything else is, and it is said why."""

from __future__ import annotations

import os
import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.cli.gc import gc, size_text
from mlops_ray.errors import ArtifactError, MlopsRayError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore, open_artifacts
from mlops_ray.metadata.belonging import claim
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.leftovers import find_leftovers, remove_leftovers
from mlops_ray.metadata.records import Link, NewKey, RunRecord, StepChange, StepRecord
from mlops_ray.metadata.retention import (
    Memory,
    Policy,
    collect,
    make_plan,
    needed,
    pin,
    pins_of,
    recall,
    upstream,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)
POLICY = Policy(older_than=timedelta(days=30), keep_runs=2)


def ref(name: str) -> ArtifactRef:
    return ArtifactRef(digest=digest_json(name), kind="json", size=len(name))


def run(run_id: str, ended: datetime | None, workflow: str = "train", **more: Any) -> RunRecord:
    return RunRecord(
        run_id=run_id,
        project="shop",
        workflow=workflow,
        status="succeeded" if ended else "running",
        config_digest="",
        started_at=(ended or NOW) - timedelta(minutes=5),
        ended_at=ended,
        owner="",
        config={},
        provenance=more,
    )


@st.composite
def memories(draw: st.DrawFn) -> list[Memory]:
    """Runs of a few days to a year ago, whose steps share artifacts, some of which write models."""
    chance = draw(st.randoms(use_true_random=False))
    return [_memory(chance, number) for number in range(draw(st.integers(1, 8)))]


def _memory(chance: random.Random, number: int) -> Memory:
    # Another workflow that made the same keys first calls its steps by other names.
    prefix = chance.choice(["", "", "nightly/"])
    ended = None if chance.random() < 0.1 else NOW - timedelta(days=chance.choice([1, 29, 31, 300]))
    changes = ref(f"changes{number}").model_dump() if chance.random() < 0.3 else None
    record = run(f"run{number}", ended, chance.choice(["train", "loop"]), changes=changes)
    steps, parts = [], {}
    for index in range(chance.randint(1, 6)):
        name, key = f"s{index}", f"{number}/{index}" if chance.random() < 0.9 else None
        output = ref(f"artifact{chance.randrange(12)}") if chance.random() < 0.8 else None
        steps.append(_step(record, name, key, output))
        sources = [s for s in steps if s.item < 0 and s.output and chance.random() < 0.4]
        inputs = {
            s.name: {"step": f"{prefix}{s.name}", "digest": s.output.digest if s.output else ""}
            for s in sources
        }
        if chance.random() < 0.05:
            inputs["lost"] = {"step": "s0", "digest": "?"}
        if key is not None and chance.random() < 0.9:
            parts[key] = {"inputs": inputs | {"seed": {"config": 1}}}
        if chance.random() < 0.2:
            steps.append(_step(record, name, None, ref(f"call{number}"), item=0))
    links = [
        Link(run_id=record.run_id, step=step.name, direction="writes", kind="model", name=name)
        for step in steps
        if chance.random() < 0.15
        for name in [f"shop@{number}{step.name}"]
    ]
    return Memory(record, steps, links, parts)


def _step(
    record: RunRecord, name: str, key: str | None, output: ArtifactRef | None, item: int = -1
) -> StepRecord:
    return StepRecord(
        run_id=record.run_id,
        name=name,
        item=item,
        position=0,
        status="succeeded",
        key=key,
        output=output,
    )


def brute_force(memory: Memory, step: str) -> set[str]:
    """All steps from which a chain of inputs leads to a step, by trying all pairs again and again."""
    names = {s.name for s in memory.steps}
    keys = {s.name: s.key for s in memory.steps if s.item < 0}
    gave = {s.name: s.output.digest if s.output else "" for s in memory.steps if s.item < 0}
    found = {step}
    while True:
        if any(memory.parts.get(keys[name] or "") is None for name in found):
            return names
        read = {
            said["digest"]
            for name in found
            for said in memory.parts[keys[name] or ""]["inputs"].values()
            if "digest" in said
        }
        if not read <= set(gave.values()):
            return names
        more = {name for name, digest in gave.items() if digest in read}
        if more <= found:
            return found
        found |= more


@settings(max_examples=150, deadline=None)
@given(memories=memories(), keep_runs=st.integers(0, 3), data=st.data())
def test_exactly_what_a_pin_needs_is_kept(
    memories: list[Memory], keep_runs: int, data: st.DataObject
) -> None:
    every = {s.output.digest for m in memories for s in m.steps if s.output}
    every |= {r.digest for m in memories for r in m.changes}
    pins = {m.run.run_id for m in memories if data.draw(st.integers(0, 9)) == 0}
    pins |= {digest for digest in sorted(every) if data.draw(st.integers(0, 19)) == 0}
    policy = Policy(older_than=timedelta(days=30), keep_runs=keep_runs)
    kept = set(needed(memories, policy, NOW, pins=pins))
    expected = set()
    for memory in memories:
        mine = [s for s in memory.steps if s.output is not None]
        same = [m.run for m in memories if m.run.workflow == memory.run.workflow]
        newer = sum(r.started_at > memory.run.started_at for r in same)
        ties = sum(r.started_at == memory.run.started_at for r in same)
        young = memory.run.ended_at is None or memory.run.ended_at > NOW - timedelta(days=30)
        is_newest = newer + ties <= keep_runs
        if young or is_newest or memory.run.run_id in pins:
            expected |= {s.output.digest for s in mine if s.output}
            expected |= {r.digest for r in memory.changes}
        for link in memory.links:
            names = brute_force(memory, link.step)
            expected |= {s.output.digest for s in mine if s.output and s.name in names}
            expected |= {r.digest for r in memory.changes}
    expected |= pins & every
    assert expected <= kept
    doubtful = set()
    for memory in memories:
        # Of runs that began at the same moment, either is the newest.
        ties = [
            m
            for m in memories
            if m.run.workflow == memory.run.workflow and m.run.started_at == memory.run.started_at
        ]
        if len(ties) > 1:
            doubtful |= {s.output.digest for s in memory.steps if s.output}
            doubtful |= {r.digest for r in memory.changes}
    assert kept - expected <= doubtful


@given(memories=memories())
def test_upstream_is_the_closure_of_the_inputs(memories: list[Memory]) -> None:
    for memory in memories:
        for step in memory.steps:
            assert upstream(memory, step.name) == brute_force(memory, step.name)


def test_of_a_part_of_an_output_the_name_counts_where_the_other_names_hold() -> None:
    old = run("old", NOW)
    steps = [_step(old, n, n, ref(n)) for n in ("data", "fit", "other", "register")]
    whole = {"step": "fit", "digest": ref("fit").digest}
    part = {"step": "data", "part": "versions", "value": 3}
    parts: dict[str, Any] = {name: {"inputs": {}} for name in ("data", "fit", "other")}

    def reached(*inputs: dict[str, Any]) -> set[str]:
        told = parts | {"register": {"inputs": dict(zip("abc", inputs, strict=False))}}
        return upstream(Memory(old, steps, [], told), "register")

    every = {"data", "fit", "other", "register"}
    assert reached(whole, part) == every - {"other"}
    assert reached(part | {"step": "nightly/data"}) == every
    assert reached(whole | {"step": "nightly/fit"}, part) == every
    assert reached(whole | {"step": "nightly/fit"}) == {"fit", "register"}


def test_a_version_that_was_deleted_needs_nothing_and_one_without_a_link_needs_its_run() -> None:
    old = run("old", NOW - timedelta(days=300))
    steps = [_step(old, "fit", "k", ref("model")), _step(old, "report", "l", ref("report"))]
    link = Link(run_id="old", step="fit", direction="writes", kind="model", name="shop@1")
    memory = Memory(old, steps, [link], {"k": {"inputs": {}}})
    policy = Policy(keep_runs=0)
    assert set(needed([memory], policy, NOW)) == {ref("model").digest}
    assert set(needed([memory], policy, NOW, registered={"shop@1": "old"})) == {ref("model").digest}
    assert needed([memory], policy, NOW, registered={"shop@2": "new"}) == {}
    unlinked = Memory(old, steps)
    found = needed([unlinked], policy, NOW, registered={"shop@1": "old"})
    assert {reason for _, reason in found.values()} == {"model shop@1 needs it"}
    assert len(found) == 2


@pytest.fixture
def artifacts(home: Home) -> ArtifactStore:
    return open_artifacts(home)


@pytest.fixture
def ledger(home: Home) -> Ledger:
    return Ledger(home.ledger_url)


def record(ledger: Ledger, run_id: str, outputs: dict[str, ArtifactRef], days_ago: int) -> None:
    """Write a run that ended some days ago; each step needs the one before."""
    ended = datetime.now(UTC) - timedelta(days=days_ago)
    ledger.start_run(run(run_id, ended).model_copy(update={"ended_at": ended}), [*outputs])
    before: tuple[str, ArtifactRef] | None = None
    for name, output in outputs.items():
        key = f"{run_id}/{name}"
        inputs = {"data": {"step": before[0], "digest": before[1].digest}} if before else {}
        values = {"status": "succeeded", "key": key, "output": output}
        ledger.apply(
            [
                StepChange(run_id=run_id, name=name, values=values),
                NewKey(key=key, parts={"inputs": inputs}),
            ]
        )
        before = (name, output)


def age(artifacts: ArtifactStore, days: float = 5) -> None:
    """Make everything that is stored look as if it had not been used for days."""
    long_ago = time.time() - days * 86400
    for blob in list(artifacts.blobs.blobs()):
        os.utime(artifacts.path(blob.digest), (long_ago, long_ago))


def gone(artifacts: ArtifactStore, ledger: Ledger, policy: Policy) -> set[str]:
    plan = make_plan(ledger, artifacts, policy)
    return {verdict.blob.digest for verdict in collect(artifacts, plan, policy.grace)}


def test_old_artifacts_go_and_needed_ones_stay(
    artifacts: ArtifactStore, ledger: Ledger, tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("weights")
    elements = [artifacts.put({"part": number}) for number in range(3)]
    old = {"parts": artifacts.put_list(elements), "fit": artifacts.put(tmp_path / "tree")}
    after = artifacts.put({"after": "fit"})
    record(ledger, "old", old | {"after": after}, days_ago=100)
    ledger.apply([Link(run_id="old", step="fit", direction="writes", kind="model", name="shop@1")])
    other = artifacts.put("of an old run")
    record(ledger, "older", {"a": other}, days_ago=200)
    recent = artifacts.put("of a young run")
    record(ledger, "young", {"a": recent}, days_ago=2)
    orphan = artifacts.put("of no run")
    age(artifacts)
    fresh = artifacts.put("just written")
    policy = Policy(keep_runs=0)
    plan = make_plan(ledger, artifacts, policy)
    reasons = {verdict.blob.digest: (verdict.kept, verdict.reason) for verdict in plan}
    assert reasons == {
        **{e.digest: (True, "model shop@1 needs it") for e in (*elements, *old.values())},
        recent.digest: (True, "of a run younger than 30 d"),
        fresh.digest: (True, "written or used a short time ago"),
        after.digest: (False, "only old runs name it"),
        other.digest: (False, "only old runs name it"),
        orphan.digest: (False, "no run names it"),
    }
    assert gone(artifacts, ledger, policy) == {after.digest, other.digest, orphan.digest}
    assert all(artifacts.verify(kept) for kept in (*elements, *old.values(), recent, fresh))
    assert not artifacts.verify(other)
    assert ledger.steps("older")[0].output == other
    assert artifacts.put("of an old run") == other
    assert artifacts.verify(other)


def test_what_comes_into_use_meanwhile_stays(artifacts: ArtifactStore, ledger: Ledger) -> None:
    hit, put, unused = artifacts.put("hit"), artifacts.put("put"), artifacts.put("unused")
    age(artifacts)
    plan = make_plan(ledger, artifacts, Policy(keep_runs=0))
    assert artifacts.verify(hit)
    artifacts.put("put")
    removed = collect(artifacts, plan, POLICY.grace)
    assert {verdict.blob.digest for verdict in removed} == {unused.digest}
    assert artifacts.verify(hit)
    assert artifacts.verify(put)


def test_a_use_between_the_look_and_the_removal_puts_it_back(
    artifacts: ArtifactStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = artifacts.put("used at the last moment")
    age(artifacts)
    plan = make_plan(ledger, artifacts, Policy(keep_runs=0))
    real = artifacts.blobs._set_aside  # type: ignore[attr-defined]
    monkeypatch.setattr(
        artifacts.blobs, "_set_aside", lambda digest: (artifacts.verify(ref), real(digest))[1]
    )
    assert collect(artifacts, plan, POLICY.grace) == []
    assert artifacts.verify(ref)


def test_pins_are_kept_until_they_are_taken_back(artifacts: ArtifactStore, ledger: Ledger) -> None:
    one, two = artifacts.put("one"), artifacts.put("two")
    record(ledger, "old", {"a": one}, days_ago=100)
    age(artifacts)
    pin(ledger, artifacts, "old")
    pin(ledger, artifacts, two.digest)
    assert pins_of(ledger) == {"old", two.digest}
    policy = Policy(keep_runs=0)
    assert gone(artifacts, ledger, policy) == set()
    pin(ledger, artifacts, "old", remove=True)
    assert gone(artifacts, ledger, policy) == {one.digest}
    with pytest.raises(MlopsRayError, match="neither a run nor"):
        pin(ledger, artifacts, "nonsense")
    with pytest.raises(MlopsRayError, match="neither a run nor"):
        pin(ledger, artifacts, "f" * 64)
    with pytest.raises(MlopsRayError, match="not pinned"):
        pin(ledger, artifacts, "old", remove=True)


def test_drafts_of_the_dead_are_swept_and_those_of_the_living_stay(
    artifacts: ArtifactStore, ledger: Ledger, home: Home
) -> None:
    artifacts.put(1)
    for name, days in ((".incoming-dead", 5), (".incoming-alive", 0)):
        (home.artifacts / name).mkdir()
        moment = time.time() - days * 86400
        os.utime(home.artifacts / name, (moment, moment))
    gone(artifacts, ledger, POLICY)
    assert [path.name for path in home.artifacts.glob(".incoming-*")] == [".incoming-alive"]


def test_checkpoints_of_runs_that_are_over_go(home: Home) -> None:
    names = {
        "20260101-000000-0001": ("succeeded", 300),
        "20260501-000000-0002": ("failed", 10),
        "20260101-000000-0003": ("failed", 300),
        "20260601-000000-0004": ("running", 0),
    }
    runs = []
    for run_id, (status, days) in names.items():
        (home.training / f"{run_id}-fit").mkdir(parents=True)
        (home.training / f"{run_id}-fit/checkpoint").write_bytes(b"12345")
        ended = None if status == "running" else NOW - timedelta(days=days)
        runs.append(run(run_id, ended).model_copy(update={"status": status}))
    (home.training / "adhoc-adhoc-1234").mkdir()
    found = find_leftovers(home, runs, POLICY, NOW)
    assert [(leftover.path.name, leftover.size) for leftover in found] == [
        ("20260101-000000-0001-fit", 5),
        ("20260101-000000-0003-fit", 5),
    ]
    remove_leftovers(found)
    assert len(list(home.training.iterdir())) == 3


def test_what_killed_reproductions_left_goes(home: Home) -> None:
    for name, days in (("dead", 5), ("alive", 5), ("new", 0)):
        (home.reproductions / name / "home").mkdir(parents=True)
        (home.reproductions / name / "home/file").write_bytes(b"123")
        moment = NOW.timestamp() - days * 86400
        for path in [*(home.reproductions / name).rglob("*"), home.reproductions / name]:
            os.utime(path, (moment, moment))
    os.utime(home.reproductions / "alive/home/file", (NOW.timestamp(), NOW.timestamp()))
    found = find_leftovers(home, [], POLICY, NOW)
    assert [(leftover.path.name, leftover.size) for leftover in found] == [("dead", 3)]


def test_a_corrupt_list_stops_the_collection(artifacts: ArtifactStore, ledger: Ledger) -> None:
    parts = artifacts.put_list([artifacts.put({"part": number}) for number in range(3)])
    record(ledger, "old", {"parts": parts}, days_ago=100)
    pin(ledger, artifacts, "old")
    age(artifacts)
    path = artifacts.path(parts.digest)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"json", b"tree"))
    with pytest.raises(ArtifactError, match="a list of artifacts is corrupt"):
        make_plan(ledger, artifacts, Policy(keep_runs=0))
    path.unlink()
    plan = make_plan(ledger, artifacts, Policy(keep_runs=0))
    assert [verdict.kept for verdict in plan] == [False] * 3


def test_a_ledger_that_is_not_the_stores_collects_nothing(
    home: Home, artifacts: ArtifactStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLOPS_RAY_HOME", str(home.root))
    old = artifacts.put("x")
    record(ledger, "old", {"a": old}, days_ago=100)
    age(artifacts)
    options = ["--keep-runs", "0", "--dry-run"]

    def said() -> str:
        return str(CliRunner().invoke(gc, options).exception or "")

    other = f"sqlite:///{home.root / 'other.db'}"
    assert said() == ""
    for marked in (False, True):
        monkeypatch.setenv("MLOPS_RAY_LEDGER", other)
        assert "is not this ledger's" in said()
        monkeypatch.delenv("MLOPS_RAY_LEDGER")
        claim(artifacts, "old")
        assert said() == "", marked
    record(Ledger(other), "another", {"a": old}, days_ago=100)
    monkeypatch.setenv("MLOPS_RAY_LEDGER", other)
    assert "the ledger that has run old" in said()
    claim(artifacts, "another")
    assert artifacts.blobs.owner() == "old"
    monkeypatch.setenv("MLOPS_RAY_HOME", str(home.root / "elsewhere"))
    monkeypatch.delenv("MLOPS_RAY_LEDGER")
    (home.root / "elsewhere/artifacts").mkdir(parents=True)
    assert "nothing has run here" in said()


def test_all_is_read_by_a_number_of_queries_that_does_not_grow(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        record(ledger, f"run{number}", {"a": ref("a"), "b": ref("b")}, days_ago=1)
        model = Link(run_id=f"run{number}", step="b", direction="writes", kind="model", name="m@1")
        ledger.apply([model])
    backend = ledger._backend
    asked: list[str] = []
    real = backend.read
    monkeypatch.setattr(
        backend, "read", lambda query, *a: (asked.append(query), real(query, *a))[1]
    )
    found = recall(ledger)
    assert len(found) == 5
    assert all(set(memory.parts) >= {f"{memory.run.run_id}/b"} for memory in found)
    assert len(asked) == len(set(asked))


def test_the_verb_explains_and_then_does(
    home: Home, artifacts: ArtifactStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("MLOPS_RAY_HOME", str(home.root))
    old = artifacts.put("x" * 5000)
    record(ledger, "old", {"a": old}, days_ago=100)
    record(ledger, "new", {"a": artifacts.put("y")}, days_ago=50)
    age(artifacts)
    options = ["--older-than", "7d", "--keep-runs", "1"]
    explained = CliRunner().invoke(gc, [*options, "--dry-run"])
    assert "one of the newest 1 runs of train" in explained.output
    assert "4.9 KiB would be freed" in explained.output
    document = json.loads(CliRunner().invoke(gc, [*options, "--dry-run", "--json"]).output)
    assert document["collected"] == {"artifacts": 1, "bytes": 5002}
    assert [a["made_by"] for a in document["artifacts"] if not a["kept"]] == ["old/a"]
    assert artifacts.verify(old)
    age(artifacts)
    assert "4.9 KiB freed" in CliRunner().invoke(gc, options).output
    assert not artifacts.verify(old)
    assert CliRunner().invoke(gc, ["--older-than", "soon"]).exit_code == 2


def test_sizes_for_people() -> None:
    assert [size_text(size) for size in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]
