"""The workflow of forty steps that is killed, and what must hold of it however it was killed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from faults.fault_steps import EFFECTS

from mlops_ray.config.workflow import Workflow
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.spec import RunSpec

STEPS = "faults.fault_steps"
TESTS = Path(__file__).parents[1]
FAR = {"num_cpus": 0.5, "custom": {"far": 0.1}}
NEAR = {"num_cpus": 0.5}
QUICKLY = {"first": "50ms", "most": "100ms"}
PARTS, BILLS = 12, 4
SETTLED = ("succeeded", "cached", "skipped")


def workflow(marks: Path) -> Workflow:
    """Declare chains, a fan-out, nested parts, effects, conditions, retries, a group."""

    def step(name: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
        given = {"marks": str(marks), **given}
        return {"uses": f"{STEPS}.{name}", "with": given, "resources": NEAR, **more}

    def effect(name: str, value: Any, **more: Any) -> dict[str, Any]:
        return step("effect", {"name": name, "value": value}, mode="effect", **more)

    once = {"idempotent": False}
    steps: dict[str, Any] = {
        "parts": step("parts", {"count": PARTS}),
        "squares": step("square", {}, map={"part": "$parts"}, resources=FAR),
        "few": step("parts", {"count": BILLS}),
        "bills": step("effect_of", {"name": "bill"}, map={"part": "$few"}, mode="effect", **once),
        "table": step("table", {"values": "$squares"}),
        "files": step("files", {"table": "$table", "name": "a"}, resources=FAR),
        "sum": step("read", {"folder": "$files"}),
        "flaky": step("flaky", {"value": "$sum"}, retries={"user": 2, "backoff": QUICKLY}),
        "verdict": step("judge", {"value": "$flaky"}),
        "charge": effect("charge", "$flaky", **once, when="$verdict.passed"),
        "charge_far": effect("charge_far", "$charge", idempotent=False, resources=FAR),
        "notify": effect("notify", "$sum"),
        "notify_far": effect("notify_far", "$notify", resources=FAR, priority=5),
        "refund": effect("refund", "$sum", idempotent=False, when="$verdict.score > 100"),
        "after_refund": step("fold", {"values": ["$refund"]}),
        "up": step("ensure", {"name": "up", "value": "$sum"}, mode="ensure"),
        "prepare": {"workflow": _prepare(step), "with": {"base": "$sum"}},
    }
    value = "$few"
    for number in range(1, 11):
        # Every third of the chain is on the node that may be lost.
        where = FAR if number % 3 == 0 else NEAR
        given = {"values": value if number == 1 else [value]}
        steps[f"chain_{number}"] = step("fold", given, resources=where)
        value = f"$chain_{number}"
    for number in range(1, 6):
        values = ["$chain_2", number]
        steps[f"warm_{number}"] = step("fold", {"values": values}, group="warm")
    everything = [
        value,
        "$prepare.made",
        "$charge_far",
        "$notify_far",
        *(f"$warm_{number}" for number in range(1, 6)),
    ]
    steps["last"] = step("fold", {"values": everything}, after=["bills", "up"])
    steps["last_charge"] = effect("last_charge", "$last", idempotent=False)
    return Workflow.model_validate({"name": "killed", "steps": steps, "max_parallel": 6})


def _prepare(step: Any) -> dict[str, Any]:
    deeper = {
        "name": "deeper",
        "inputs": {"value": None},
        "outputs": {"made": "$two"},
        "steps": {
            "one": step("fold", {"values": ["$inputs.value", 1]}),
            "two": step("fold", {"values": ["$one", 2]}, resources=FAR),
        },
    }
    steps = {
        "first": step("fold", {"values": ["$inputs.base"]}),
        "deeper": {"workflow": deeper, "with": {"value": "$first"}},
        "paid": step(
            "effect",
            {"name": "paid", "value": "$deeper.made"},
            mode="effect",
            idempotent=False,
        ),
        "second": step("fold", {"values": ["$first", "$paid"]}),
        "third": step("fold", {"values": ["$second"]}),
        "fourth": step("fold", {"values": ["$third", "$deeper.made"]}),
    }
    return {
        "name": "prepare",
        "inputs": {"base": None},
        "outputs": {"made": "$fourth"},
        "steps": steps,
    }


def spec_of(folder: Path) -> RunSpec:
    """Return what a driver runs: the workflow with its home and marks in a folder."""
    return RunSpec(
        project="faults",
        workflow=workflow(folder / "marks"),
        home=home_of(folder),
        config_digest="0123456789abcdef",
        packages=("faults",),
        directory=folder,
        roots=(str(TESTS),),
    )


def home_of(folder: Path) -> Home:
    return Home(folder / "home", Storage())


def effect_names(folder: Path) -> dict[str, str]:
    """Return, for each effect that must not happen twice, the name that it leaves on disk."""
    graph = build(workflow(folder / "marks"))
    steps = {name: graph.step(name) for name in graph.order}
    once = {name: step for name, step in steps.items() if step.mode == "effect"}
    return {name: step.inputs["name"] for name, step in once.items() if not step.idempotent}


def declared_once(folder: Path) -> set[str]:
    """Return the marks on disk of the effects that must happen exactly once."""
    names = set(effect_names(folder).values()) - {"refund", "bill"}
    return names | {f"bill[{part}]" for part in range(BILLS)}


def happened(folder: Path) -> Counter[str]:
    """Count how often each effect has happened."""
    return Counter(name for name, _ in effects(folder))


def effects(folder: Path) -> list[tuple[str, int]]:
    """Return the effects that have happened, and in which processes."""
    file = folder / "marks" / EFFECTS
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(process)) for name, process in map(str.split, lines)]


def outputs(folder: Path) -> dict[str, str]:
    """Return what the only run gave: digests of all outputs by step and call; skips by word.

    Raises:
        AssertionError: There are several runs, or one that has not succeeded with every step over.
    """
    ledger = Ledger(home_of(folder).ledger_url)
    try:
        (run,) = ledger.runs()
        assert run.status == "succeeded", run.status
        records = ledger.steps(run.run_id)
        for name in ("squares", "bills"):
            records += ledger.items(run.run_id, name)
    finally:
        ledger.close()
    found = {}
    for record in records:
        where = record.name if record.item < 0 else f"{record.name}[{record.item}]"
        assert record.status in SETTLED, (where, record.status)
        found[where] = record.output.digest if record.output is not None else record.status
    return found


def check(folder: Path, oracle: dict[str, str]) -> None:
    """Check that a run that was cut off and taken up is like one that was not.

    Raises:
        AssertionError: An output differs, or an effect happened too often or not at all.
    """
    made = outputs(folder)
    different = {name for name in made | oracle if made.get(name) != oracle.get(name)}
    assert not different, {name: (made.get(name), oracle.get(name)) for name in different}
    counts = happened(folder)
    once = {name: counts[name] for name in declared_once(folder)}
    assert set(once.values()) == {1}, once
    for name in ("notify", "notify_far", "up"):
        assert counts[name] >= 1, name
    assert counts["refund"] == 0
