"""The verbs ``features …`` on a project whose store is filled."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlops_ray.cli.init import write_project
from mlops_ray.config.locate import open_workspace
from mlops_ray.features import steps
from mlops_ray.features.store import FeatureStore
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.load import load_project
from mlops_ray.orchestration.reporting import LiveReporter

NAME = "parcels"
VIEWS = ["courier_latest", "courier_history"]
VERBS = [
    "list", "show", "lineage", "stats", "freshness", "get", "versions", "manifests", "expectations",
    "plan", "apply", "prune", "compact", "vacuum", "export",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_project(tmp_path, NAME, NAME)
    return tmp_path


@pytest.fixture
def filled(command: Any, project: Path) -> Path:
    """The project after its features workflow, run step by step in this process."""
    declared = load_project(open_workspace(project), ["features.sources.orders.args.count=600"])
    home = Home(declared.home)
    reporter = LiveReporter(declared.name, home, "run-1", "clean", -1, None)
    context = Context(declared.name, home, step="extract")
    raw = steps.extract(context, declared.features)
    cleaning = Context(declared.name, home, "run-1", "clean", reporter)
    cleaned = steps.clean(cleaning, declared.features, raw)
    versions = steps.materialize(context, declared.features, cleaned, declared.until)
    context = Context(declared.name, home, step="training_set")
    steps.training_set(context, declared.features, "delivery", cleaned, versions, declared.until)
    return project


FEW = "features.sources.orders.args.count=600"


def test_help_names_every_verb(command: Any) -> None:
    outcome = command("features", "-h")
    assert outcome.code == 0
    listed = outcome.out.partition("Commands:")[2].splitlines()
    sentences = dict(line.split(maxsplit=1) for line in listed if line.strip())
    assert sorted(sentences) == sorted(VERBS)
    assert all(s.endswith(".") and not s.endswith("...") for s in sentences.values())


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_takes(command: Any, verb: str) -> None:
    outcome = command("features", verb, "-h")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: mlops-ray features {verb}")


def test_plan_of_an_empty_store(command: Any, project: Path) -> None:
    outcome = command("features", "plan")
    assert outcome.code == 0, outcome.err
    for view in VIEWS:
        assert any(view in line and "new" in line for line in outcome.out.splitlines())
    made = json.loads(command("features", "plan", "--json").out)
    assert [change["action"] for change in made["changes"]] == ["new", "new"]
    assert not (project / ".mlops-ray").exists()


def test_plan_apply_and_plan_again(command: Any, filled: Path) -> None:
    same = json.loads(command("features", "plan", FEW, "--json").out)
    assert [change["action"] for change in same["changes"]] == ["unchanged", "unchanged"]
    told = "features.views.courier_latest.ttl=2d"
    made = command("features", "apply", FEW, told)
    assert made.code == 0, made.err
    assert "view.ttl: 7d → 2d" in made.out
    after = json.loads(command("features", "plan", FEW, told, "--json").out)
    assert [change["action"] for change in after["changes"]] == ["unchanged", "unchanged"]


def test_a_refused_change_is_explained_and_nothing_is_touched(command: Any, filled: Path) -> None:
    file = filled / "configs" / "project" / f"{NAME}.yaml"
    before = file.read_text()
    file.write_text(before.replace("[delay_hours]", "{delay_hours: string}"))
    outcome = command("features", "plan", FEW)
    assert "refuse" in outcome.out
    assert "features.views.courier_latest.version" in outcome.out
    applied = command("features", "apply", FEW)
    assert applied.code == 1
    assert "column delay_hours is stored as double, declared as string" in applied.err
    file.write_text(before)
    same = json.loads(command("features", "plan", FEW, "--json").out)
    assert [change["action"] for change in same["changes"]] == ["unchanged", "unchanged"]


def test_list_show_and_versions(command: Any, filled: Path) -> None:
    listed = json.loads(command("features", "list", FEW, "--json").out)
    assert [item["view"] for item in listed] == VIEWS
    assert [item["version"] for item in listed] == [0, 0]
    assert "courier_latest" in command("features", "list", FEW).out
    shown = json.loads(command("features", "show", "courier_latest", FEW, "--json").out)
    assert shown["features"] == {"delay_hours": "float"}
    assert shown["services"] == ["delivery"]
    assert shown["declared"]["ttl"] == "7d"
    assert "ttl: 7d" in command("features", "show", "courier_latest", FEW).out
    (version,) = json.loads(command("features", "versions", "courier_latest", FEW, "--json").out)
    assert (version["version"], version["replaced"]) == (0, False)
    assert version["added"] > 100
    missing = command("features", "show", "courier_last", FEW)
    assert missing.code == 1
    assert "there is no feature view 'courier_last'" in missing.err


def test_get_online_and_offline_agree(command: Any, filled: Path) -> None:
    line = ("features", "get", "courier_latest", "courier=courier_03", FEW, "--at", "2024-02-15")
    online = json.loads(command(*line, "--json").out)
    offline = json.loads(command(*line, "--offline", "--json").out)
    assert online[0]["feature"] == "delay_hours"
    assert online[0]["status"] == "present"
    assert online[0]["value"] == offline[0]["value"]
    assert "present" in command(*line).out
    unknown = command("features", "get", "courier_latest", "courier=nobody", FEW, "--json")
    assert json.loads(unknown.out)[0]["status"] == "not found"
    wrong = command("features", "get", "courier_latest", "corier=x", FEW)
    assert wrong.code == 1
    assert "is looked up by courier" in wrong.err
    assert command("features", "get", "courier_latest", "courier=x", "--at", "soon").code == 2


def test_what_is_no_length_of_time_and_no_whole_number_is_said(command: Any, filled: Path) -> None:
    for retention in ("7x", "99999999999w"):
        outcome = command("features", "vacuum", FEW, "--retention", retention)
        assert outcome.code == 2
        assert "--retention" in outcome.err
    whole = "features.entities.courier.keys.courier=int"
    for text in ("--5", "²", "1_000", "9" * 5000):
        outcome = command("features", "get", "courier_latest", f"courier={text}", FEW, whole)
        assert outcome.code == 1
        assert "key 'courier' is a whole number" in outcome.err
    huge = command("features", "get", "courier_latest", f"courier={2**63}", FEW, whole)
    assert huge.code == 1
    assert "does not fit in 64 bits" in huge.err


def test_a_moment_without_a_time_zone_is_utc(filled: Path) -> None:
    declared = load_project(open_workspace(filled), [FEW])
    store = FeatureStore(declared.features, Home(declared.home), declared.name)
    key = {"courier": "courier_03"}
    for offline in (False, True):
        found = store.get("courier_latest", key, datetime(2024, 2, 15), offline=offline)
        aware = datetime(2024, 2, 15, tzinfo=UTC)
        assert found == store.get("courier_latest", key, aware, offline=offline)


def test_stats_and_freshness(command: Any, filled: Path) -> None:
    found = json.loads(command("features", "stats", "courier_latest", FEW, "--json").out)
    assert found["rows"] > 100
    assert found["entities"] == 12
    assert found["features"][0]["minimum"] <= found["features"][0]["mean"]
    assert "12 entities" in command("features", "stats", "courier_latest", FEW).out
    assert command("features", "freshness", FEW).code == 0
    target = "+features.views.courier_latest.freshness=1h"
    stale = command("features", "freshness", FEW, target)
    assert stale.code == 1
    assert any("stale" in line for line in stale.out.splitlines() if "courier_latest" in line)
    assert command("features", "freshness", FEW, target, "--at", "2024-02-01").code == 0


def test_lineage_manifests_and_expectations(command: Any, filled: Path) -> None:
    found = json.loads(command("features", "lineage", "courier_latest", FEW, "--json").out)
    assert found["kind"] == "view"
    pairs = {(edge["origin"], edge["made"]) for edge in found["edges"]}
    assert ("orders", "courier_latest") in pairs
    assert ("courier_latest", "delivery") in pairs
    assert "service delivery" in command("features", "lineage", "orders", FEW).out
    manifests = json.loads(command("features", "manifests", FEW, "--json").out)
    ((name, manifest),) = manifests.items()
    assert set(manifest["views"]) == set(VIEWS)
    assert name in command("features", "manifests", FEW).out
    results = json.loads(command("features", "expectations", FEW, "--json").out)
    assert len(results) > 5
    assert {result["source"] for result in results} == {"orders"}
    failed = json.loads(command("features", "expectations", FEW, "--failed", "--json").out)
    assert all(not result["passed"] for result in failed)
    assert "orders" in command("features", "expectations", FEW).out


def test_upkeep_and_export(command: Any, filled: Path) -> None:
    output = filled / "rows"
    line = ("features", "export", "courier_latest", FEW, "--output", str(output))
    narrowed = command(*line, "--since", "2024-02-01", "--until", "2024-02-10")
    assert narrowed.code == 0, narrowed.err
    rows = pq.read_table(output)
    times = rows["event_time"].to_pylist()
    assert rows.num_rows == int(narrowed.out.split()[0].replace(",", "")) > 10
    assert min(times).isoformat() >= "2024-02-01"
    assert max(times).isoformat() <= "2024-02-10T00:00:00.000001"
    assert "there already" in command(*line).err
    assert command("features", "compact", "courier_latest", FEW).out.startswith("courier_latest: ")
    compacted = command("features", "compact", FEW)
    assert [line.split(":")[0] for line in compacted.out.splitlines()] == VIEWS
    dry = command("features", "vacuum", FEW, "--retention", "0s", "--dry-run")
    assert "would go" in dry.out
    assert command("features", "vacuum", FEW, "--retention", "0s").code == 0
    assert command("features", "stats", "courier_latest", FEW).code == 0


def test_prune_lists_first(command: Any, filled: Path) -> None:
    raised = "+features.views.courier_latest.version=2"
    assert json.loads(command("features", "prune", FEW, raised, "--json").out) == []
    gone = "~features.views.courier_latest"
    service = "features.services.delivery.views=[courier_history]"
    (left,) = json.loads(command("features", "prune", FEW, gone, service, "--json").out)
    assert (left["view"], left["fate"]) == ("courier_latest", "pinned by a manifest")
