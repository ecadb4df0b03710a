"""Lineage: the graph of records, what is above and below, and what words name in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metadata.lineage_world import INPUTS, World

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.lineage import Lineage, Node, build, read_lineage
from mlops_ray.metadata.lookup import find
from mlops_ray.metadata.records import NewKey, StepChange


def lineage(world: World) -> Lineage:
    return build(world.runs, world.steps, world.links, world.parts)


@pytest.fixture
def two_days() -> tuple[Lineage, str, str]:
    world = World()
    first = world.day(0)
    second = world.day(1, cached=frozenset({"extract", "clean"}))
    return lineage(world), first, second


def test_the_chain_from_source_to_deployment_is_whole(two_days: tuple[Lineage, str, str]) -> None:
    graph, _, run = two_days
    above = graph.reach(["deployment:flights"], "up")
    for step in set(INPUTS) - {"extract", "clean", "champion", "gate", "promote"}:
        assert f"step:{run}/{step}" in above
    assert {"source:flights/flights", "source:flights/weather"} <= above
    assert {"model:flights@2", "view:flights/weather@1", f"artifact:{run}/fit"} <= above
    below = graph.reach(["source:flights/weather"], "down")
    assert {"deployment:flights", "model:flights@1", "model:flights@2"} <= below


def test_what_was_cached_is_told_of_the_step_that_ran(two_days: tuple[Lineage, str, str]) -> None:
    graph, first, second = two_days
    assert f"step:{second}/clean" not in graph.nodes
    assert f"artifact:{first}/clean" in graph.up[f"step:{second}/training_set"]
    assert f"step:{first}/clean" in graph.runs[second]


def test_equal_outputs_of_unrelated_steps_do_not_join_them() -> None:
    world = World()
    run = world.day(0)
    ref = world.steps[0].output
    world.steps = [s.model_copy(update={"output": ref}) for s in world.steps]
    graph = lineage(world)
    assert graph.up[f"step:{run}/fit"] == (f"artifact:{run}/split",)


def test_a_key_made_under_other_names_of_steps_still_joins_by_digest() -> None:
    world = World()
    run = world.day(0)
    records = {step.name: step for step in world.steps}
    clean = records["clean"].output
    assert clean is not None
    parts = world.parts[str(records["training_set"].key)]
    parts["inputs"] = {"tables": {"step": "elsewhere/clean", "digest": clean.digest}}
    assert f"artifact:{run}/clean" in lineage(world).up[f"step:{run}/training_set"]


def test_a_key_made_where_another_step_had_that_name_joins_by_digest() -> None:
    world = World()
    run = world.day(0)
    world.day(1)
    records = {step.name: step for step in world.steps if step.run_id == run}
    clean = records["clean"].output
    assert clean is not None
    # Another run has an equal output: what this run has itself comes first.
    world.steps = [
        s.model_copy(update={"output": clean}) if s.run_id != run and s.name == "split" else s
        for s in world.steps
    ]
    parts = world.parts[str(records["training_set"].key)]
    parts["inputs"] = {"tables": {"step": "extract", "digest": clean.digest}}
    above = lineage(world).up[f"step:{run}/training_set"]
    assert [node for node in above if node.startswith("artifact:")] == [f"artifact:{run}/clean"]
    # A part has a digest of its own.
    parts["inputs"] = {"tables": {"step": "extract", "part": ["a"], "digest": "0" * 64}}
    assert f"artifact:{run}/extract" in lineage(world).up[f"step:{run}/training_set"]


def test_the_number_of_queries_does_not_grow_with_the_runs(home: Home) -> None:
    database = Database(home.ledger_url)
    ledger = Ledger(database)
    asked: list[str] = []
    plain = database.read
    database.read = lambda query, *given: (asked.append(query), plain(query, *given))[1]  # type: ignore[method-assign]
    world = World()
    counts = []
    for number in range(3):
        run_id = world.day(number)
        ledger.start_run(world.runs[-1], [])
        steps = [step for step in world.steps if step.run_id == run_id]
        ledger.apply(
            StepChange(run_id=run_id, name=s.name, values={"status": s.status, "key": s.key})
            for s in steps
        )
        asked.clear()
        read_lineage(ledger)
        counts.append(len(asked))
    ledger.close()
    assert counts[0] == counts[2]


def test_versions_of_a_view_follow_each_other_unless_a_step_says_how() -> None:
    world = World()
    world.day(0)
    world.day(1)
    world.links = [link for link in world.links if link.direction == "writes"]
    told = lineage(world)
    assert ("view:flights/weather@0", "view:flights/weather@1") in told.edges
    with_step = World()
    with_step.day(0)
    with_step.day(1)
    assert ("view:flights/weather@0", "view:flights/weather@1") not in lineage(with_step).edges


def test_steps_that_did_not_finish_are_not_there() -> None:
    world = World()
    run = world.day(0)
    world.steps = [
        s.model_copy(update={"status": "failed", "output": None}) if s.name == "deploy" else s
        for s in world.steps
    ]
    graph = lineage(world)
    assert f"step:{run}/deploy" not in graph.nodes
    assert "deployment:flights" not in graph.nodes


def test_folding_keeps_who_is_above_whom(two_days: tuple[Lineage, str, str]) -> None:
    graph, _, _ = two_days
    folded = graph.folded()
    assert not any(node.kind == "artifact" for node in folded.nodes.values())
    for node in folded.nodes:
        above = {n for n in graph.reach([node], "up") if not n.startswith("artifact:")}
        assert folded.reach([node], "up") == above
    output = folded.nodes[next(n for n in folded.nodes if n.endswith("/fit"))].detail["output"]
    assert output["kind"] == "tree"


def test_the_ledger_gives_the_same_graph_as_its_records(home: Home) -> None:
    world = World()
    world.day(0)
    ledger = Ledger(home.ledger_url)
    (run,) = world.runs
    ledger.start_run(run, [step.name for step in world.steps])
    ledger.apply([NewKey(key=key, parts=parts) for key, parts in world.parts.items()])
    fields = ("status", "key", "output", "ended_at", "position")
    ledger.apply(
        StepChange(
            run_id=s.run_id, name=s.name, values={field: getattr(s, field) for field in fields}
        )
        for s in world.steps
    )
    ledger.apply(world.links)
    found = read_lineage(ledger)
    ledger.close()
    assert found.to_json() == lineage(world).to_json()


# Names


@pytest.fixture
def graph(two_days: tuple[Lineage, str, str]) -> Lineage:
    return two_days[0]


def test_a_name_with_its_version_or_the_newest_one(graph: Lineage) -> None:
    assert find(graph, "flights@1") == ("model:flights@1",)
    assert find(graph, "model:flights") == ("model:flights@2",)
    assert find(graph, "airline_history") == ("view:flights/airline_history@1",)
    assert find(graph, "flights/airline_history@0") == ("view:flights/airline_history@0",)


def test_a_name_of_several_things_lists_them(graph: Lineage) -> None:
    with pytest.raises(MlopsRayError) as caught:
        find(graph, "weather")
    assert "source:flights/weather, view:flights/weather" in caught.value.fix
    assert find(graph, "source:weather") == ("source:flights/weather",)
    assert find(graph, "view:weather") == ("view:flights/weather@1",)


def test_runs_steps_and_digests(two_days: tuple[Lineage, str, str]) -> None:
    graph, first, second = two_days
    assert set(find(graph, second)) == {
        f"step:{first if name in ('extract', 'clean') else second}/{name}" for name in INPUTS
    }
    assert find(graph, "latest") == find(graph, f"run:{second}")
    assert find(graph, f"{second[:-2]}/fit") == (f"step:{second}/fit",)
    assert find(graph, f"{second}/clean") == (f"step:{first}/clean",)
    digest = graph.nodes[f"artifact:{second}/fit"].detail["digest"]
    assert find(graph, digest[:10]) == (f"artifact:{second}/fit",)


def test_unknown_names_say_what_was_meant(graph: Lineage) -> None:
    with pytest.raises(MlopsRayError, match="nothing called") as caught:
        find(graph, "wether@1")
    assert "weather@1" in caught.value.fix


# Above and below, against brute force

NAMES = "abcdefgh"
edges = st.frozensets(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=20)


def paths(found: frozenset[tuple[str, str]], start: str) -> Iterator[tuple[str, int]]:
    """Yield who is reached by each number of steps, by multiplying relations."""
    reached = {start}
    for length in range(len(NAMES) + 1):
        yield from ((name, length) for name in reached)
        reached = {b for a, b in product(reached, NAMES) if (a, b) in found}


@given(edges, st.sampled_from(NAMES), st.none() | st.integers(0, 5))
def test_reach_is_the_closure(
    found: frozenset[tuple[str, str]], start: str, depth: int | None
) -> None:
    graph = Lineage({name: Node(name, "step", name) for name in NAMES}, found)
    limit = len(NAMES) if depth is None else depth
    expected = {name for name, length in paths(found, start) if length <= limit}
    assert graph.reach([start], "down", depth) == expected
    turned = frozenset((b, a) for a, b in found)
    above = {name for name, length in paths(turned, start) if length <= limit}
    assert graph.reach([start], "up", depth) == above
    part = graph.around([start], ("up", "down"), depth)
    assert set(part.nodes) == expected | above
    assert part.edges <= found
