"""Plan and why: what would run and what ran, beside what is known of before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from orchestration.packages import package

from mlops_ray.cli.why import why
from mlops_ray.config.workflow import Workflow
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import ArtifactRef, open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import Link, NewEvent, NewKey, RunRecord, StepChange
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.keys import item_key
from mlops_ray.orchestration.plan import Plan, PlannedStep, key_in, make_plan
from mlops_ray.orchestration.resolution import element_digest, elements_of, refusal
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.why import Explanation, describe, explain, explain_plan, last_run

NAME = "explained_project"
STEPS = """
from .maths import double
def load(path): return 1
def clean(raw, size=1): return double(raw)
def fit(data, rate=0.1): return 1
def report(model): return 1
"""
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    files = {"steps.py": STEPS, "maths.py": "def double(x): return 2 * x\ndef half(x): return x\n"}
    with package(tmp_path, NAME, files) as made:
        yield made


class Driver:
    """Runs workflows on paper: what steps give is given, what is recorded is real."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.ledger = open_ledger(home)
        self.artifacts = open_artifacts(home)
        self.count = 0
        self.steps: dict[str, dict[str, Any]] = {
            "load": {"uses": "load", "with": {"path": "a"}, "mode": "ensure"},
            "clean": {"uses": "clean", "with": {"raw": "$load"}},
            "fit": {"uses": "fit", "with": {"data": "$clean", "rate": {"a": [1, 2]}}},
            "report": {"uses": "report", "with": {"model": "$fit"}, "mode": "effect"},
        }
        self.gives: dict[str, Any] = {"load": 1, "clean": 2, "fit": 3, "report": 4}

    def spec(self, name: str = "w") -> RunSpec:
        steps = {n: s | {"uses": f"{NAME}.steps.{s['uses']}"} for n, s in self.steps.items()}
        workflow = Workflow.model_validate({"name": name, "steps": steps})
        config = {"workflow": workflow.model_dump(mode="json", by_alias=True)}
        return RunSpec("p", workflow, self.home, config=config, packages=(NAME,))

    def run(
        self, *, status: str = "succeeded", name: str = "w", links: tuple[str, ...] = ()
    ) -> RunRecord:
        spec, graph = self.spec(name), build(self.spec(name).workflow)
        self.count += 1
        record = RunRecord(
            run_id=f"run-{self.count}",
            project="p",
            workflow=name,
            status="running",
            config_digest=spec.config_digest,
            started_at=START + timedelta(hours=self.count),
            ended_at=None,
            owner="me",
            config=spec.config,
            provenance={},
        )
        self.ledger.start_run(record, list(graph.order))
        outputs: dict[str, ArtifactRef] = {}
        for step in graph.order:
            reason = refusal(graph.conditions(step), outputs, self.artifacts)
            if reason is not None:
                self.change(record, step, status="skipped", message=reason)
                continue
            key = key_in(graph, step, outputs, self.artifacts, spec.packages)
            known = self.ledger.cached([key.key]).get(key.key)
            hit = known is not None and graph.step(step).mode == "pure"
            outputs[step] = self.artifacts.put(self.gives[step])
            values = {"status": "cached" if hit else "succeeded", "ended_at": datetime.now(UTC)}
            self.change(record, step, key=key.key, output=outputs[step], **values)
            self.ledger.apply([NewKey(key=key.key, parts=key.parts)])
        for link in links:
            step, kind, thing = link.split()
            written = Link(
                run_id=record.run_id,
                step=step,
                direction="writes",
                kind=kind,
                name=thing,
            )
            self.ledger.apply([written])
        self.ledger.finish_run(record.run_id, status)
        return record

    def change(self, record: RunRecord, step: str, **values: Any) -> None:
        self.ledger.apply([StepChange(run_id=record.run_id, name=step, values=values)])

    def explain(self, step: str, record: RunRecord) -> Explanation:
        return explain(self.ledger, step, record)

    def plan(self) -> Plan:
        spec = self.spec()
        return make_plan(spec, build(spec.workflow), self.ledger, self.artifacts)

    def planned(self) -> dict[str, PlannedStep]:
        return {item.name: item for item in self.plan().steps}

    def path(self, record: RunRecord, step: str) -> Path:
        (output,) = [s.output for s in self.ledger.steps(record.run_id) if s.name == step]
        assert output is not None
        return next(self.home.artifacts.rglob(output.digest))


@pytest.fixture
def driver(root: Path, home: Home) -> Driver:
    return Driver(home)


def changes(found: Explanation) -> list[str]:
    return [describe(change) for change in found.changes]


def test_a_first_run_and_a_cached_one_say_so(driver: Driver) -> None:
    first = driver.explain("fit", driver.run())
    assert (first.reason, first.changes) == ("ran: it had not run before", ())
    second = driver.explain("fit", driver.run())
    assert second.reason == "came from the cache"
    assert second.status == "cached"


def test_a_changed_config_value_is_named_with_its_path_old_and_new(driver: Driver) -> None:
    driver.run()
    driver.steps["fit"]["with"]["rate"] = {"a": [1, 3], "b": True}
    found = driver.explain("fit", driver.run())
    assert found.reason == "ran: what it depends on changed"
    assert found.against == "run-1"
    assert changes(found) == ["config rate.a.1: 2 → 3", "config rate.b: (nothing) → True"]


def test_changed_added_and_removed_code_is_named(driver: Driver, root: Path) -> None:
    driver.run()
    (root / "maths.py").write_text("def double(x): return half(x)\ndef half(x): return x\n")
    found = driver.explain("clean", driver.run())
    assert changes(found) == [
        f"code {NAME}.maths.double changed",
        f"code {NAME}.maths.half added",
    ]
    (root / "maths.py").write_text("def double(x): return 2 * x\ndef half(x): return x\n")
    driver.run()
    (root / "maths.py").write_text("def double(x): return 3 * x\n")
    assert changes(driver.explain("clean", driver.run())) == [f"code {NAME}.maths.double changed"]


def test_an_input_is_traced_to_the_step_that_began_it_and_why_that_one_changed(
    driver: Driver,
) -> None:
    driver.run()
    driver.steps["clean"]["with"]["size"] = 7
    driver.gives |= {"clean": 20, "fit": 30}
    found = driver.explain("report", driver.run())
    assert found.reason == "ran: what it depends on changed"
    (model,) = found.changes
    assert (model.part, model.name) == ("input", "model")
    assert model.cause is not None
    (data,) = model.cause.changes
    assert data.cause is not None
    assert changes(data.cause) == ["config size: (nothing) → 7"]
    assert list(found.causes()) == ["config size: (nothing) → 7"]


def test_a_step_that_reads_the_world_is_named_as_the_cause_with_what_it_wrote(
    driver: Driver,
) -> None:
    driver.run(links=("load view weather@14",))
    driver.gives["load"] = 10
    found = driver.explain("clean", driver.run(links=("load view weather@15",)))
    assert list(found.causes()) == [
        "load: ran: it makes a state so, in every attempt; wrote view weather@15, before weather@14"
    ]


def test_a_step_that_gives_another_output_for_the_same_key_is_called_not_deterministic(
    driver: Driver,
) -> None:
    first = driver.run()
    driver.path(first, "clean").unlink()
    driver.gives["clean"] = 99
    record = driver.run()
    driver.change(record, "clean", status="succeeded")
    found = driver.explain("fit", record)
    assert "clean: the same code and inputs gave another output" in next(found.causes())


def test_a_skipped_step_says_why(driver: Driver) -> None:
    driver.steps["fit"]["when"] = "$clean > 5"
    del driver.steps["report"]
    found = driver.explain("fit", driver.run())
    assert found.reason == "was skipped: $clean > 5 is false: it is 2"


def test_a_corrupt_output_is_the_reason_where_nothing_changed(driver: Driver) -> None:
    driver.run()
    record = driver.run()
    driver.change(record, "fit", status="succeeded")
    assert "nothing changed; its output was no longer there" in driver.explain("fit", record).reason
    event = NewEvent(project="p", kind="artifact_corrupt", run_id=record.run_id, step="fit")
    driver.ledger.apply([event])
    assert driver.explain("fit", record).reason == (
        "ran: nothing changed; its output was corrupt or missing"
    )


def test_a_run_of_the_same_workflow_is_compared_before_others(driver: Driver) -> None:
    driver.run(name="w")
    driver.run(name="other")
    driver.steps["fit"]["with"]["rate"] = 5
    found = driver.explain("fit", driver.run(name="w"))
    assert found.against == "run-1"
    assert driver.explain("fit", driver.run(name="third")).against == "run-3"


def test_a_change_of_environment_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.steps["fit"]["environment"] = {"variables": ["WHY_TEST"], "packages": ["pydantic"]}
    monkeypatch.setenv("WHY_TEST", "one")
    driver.run()
    monkeypatch.setenv("WHY_TEST", "two")
    (change,) = driver.explain("fit", driver.run()).changes
    assert (change.part, change.name) == ("environment", "variables.WHY_TEST")


def test_plan_says_what_would_run_and_why_explains_it(driver: Driver) -> None:
    record = driver.run()
    states = {name: item.state for name, item in driver.planned().items()}
    assert states == {"load": "run", "clean": "cached", "fit": "cached", "report": "run"}
    assert "if load gives what it gave last" in driver.planned()["clean"].reason
    driver.steps["clean"]["with"]["size"] = 7
    states = {name: item.state for name, item in driver.planned().items()}
    assert states == {"load": "run", "clean": "run", "fit": "depends", "report": "depends"}
    found = explain_plan(driver.ledger, "clean", driver.plan(), record)
    assert found.reason == "would run: what it depends on changed"
    assert changes(found) == ["config size: (nothing) → 7"]
    later = explain_plan(driver.ledger, "fit", driver.plan(), record)
    assert later.reason == "is not known yet: depends on clean"
    assert list(later.causes()) == ["config size: (nothing) → 7"]


def test_plan_verifies_the_bytes_and_changes_nothing(driver: Driver) -> None:
    record = driver.run()
    path = driver.path(record, "fit")
    path.chmod(0o644)
    path.write_bytes(b"broken")
    item = driver.planned()["fit"]
    assert (item.state, item.reason) == ("run", "its output is missing or corrupt")
    assert path.read_bytes() == b"broken"
    found = explain_plan(driver.ledger, "fit", driver.plan(), record)
    assert found.reason == "would run: nothing changed; its output was corrupt or missing"


def test_plan_follows_conditions_and_what_needs_the_skipped(driver: Driver) -> None:
    driver.steps["load"]["mode"] = "pure"
    driver.run()
    driver.steps["fit"]["when"] = "$clean > 5"
    planned = driver.planned()
    assert planned["fit"].state == planned["report"].state == "skipped"
    assert planned["fit"].reason == "$clean > 5 is false: it is 2"
    assert planned["report"].reason == "needs fit, which would be skipped"


def test_plan_counts_the_cached_calls_of_a_mapped_step(driver: Driver) -> None:
    driver.gives["clean"] = [1, 2, 3, 2]
    driver.steps["fit"] = {"uses": "fit", "map": {"data": "$clean"}}
    del driver.steps["report"]
    driver.steps["load"]["mode"] = "pure"
    driver.gives["fit"] = [0]
    record = driver.run()
    spec = driver.spec()
    graph = build(spec.workflow)
    outputs = {s.name: s.output for s in driver.ledger.steps(record.run_id)}
    parent = key_in(graph, "fit", outputs, driver.artifacts, spec.packages)
    call = elements_of(graph.step("fit"), outputs, driver.artifacts)[1]
    key = item_key(parent, {name: element_digest(a) for name, a in call.items()})
    values = {"status": "succeeded", "key": key.key, "output": driver.artifacts.put(5)}
    values |= {"ended_at": datetime.now(UTC), "position": 0}
    change = StepChange(run_id=record.run_id, name="fit", item=1, values=values)
    driver.ledger.apply([change])
    whole = driver.explain("fit", record)
    assert whole.reason == "ran: it had not run before (0 of 1 calls came from the cache)"
    driver.change(record, "fit", key="of older code")
    item = driver.planned()["fit"]
    assert (item.calls, item.reason) == ((2, 4), "2 of 4 calls are cached")


def test_plan_shows_the_run_that_would_go_on_and_its_effects(driver: Driver) -> None:
    driver.steps["load"]["mode"] = "pure"
    record = driver.run(status="failed")
    plan = driver.plan()
    assert plan.resumes is not None
    assert plan.resumes.run_id == record.run_id
    assert driver.planned()["report"].state == "finished"
    driver.change(record, "report", status="uncertain")
    assert driver.planned()["report"].state == "uncertain"


def test_the_verb_tells_a_person_and_a_program(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.run()
    driver.steps["clean"]["with"]["size"] = 7
    driver.gives |= {"clean": 20, "fit": 30}
    record = driver.run()
    monkeypatch.setenv("MLOPS_RAY_HOME", str(driver.home.root))
    assert last_run(driver.ledger, "fit") is not None
    done = CliRunner().invoke(why, ["fit"], catch_exceptions=False)
    # Ray may print warnings of its own in between.
    lines = done.output.splitlines()
    start = lines.index("because, compared with run run-1:") - 1
    assert lines[start : start + 3] == [
        f"fit in run {record.run_id} ran: what it depends on changed",
        "because, compared with run run-1:",
        "  config size: (nothing) → 7",
    ]
    assert ", from clean, which ran: what it depends on changed" in lines[4]
    done = CliRunner().invoke(why, ["fit", "run-1", "--json"], catch_exceptions=False)
    assert json.loads(done.output)["reason"] == "ran: it had not run before"
    done = CliRunner().invoke(why, ["fit", "size=3"])
    assert done.exit_code == 2
