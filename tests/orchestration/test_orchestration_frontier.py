"""Which steps may be opened when: beside a plain reading of the graph."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph, build


def ref(digest: str = "d") -> ArtifactRef:
    return ArtifactRef(digest=digest, kind="json", size=1)


def graph_of(edges: dict[str, list[str]]) -> Graph:
    steps = {
        name: Step.model_validate({"uses": "a.b", "with": {"x": [f"${other}" for other in others]}})
        for name, others in edges.items()
    }
    return build(Workflow(name="w", steps=steps))


@st.composite
def dags(draw: st.DrawFn) -> dict[str, list[str]]:
    size = draw(st.integers(1, 9))
    return {f"s{i}": [f"s{j}" for j in range(i) if draw(st.booleans())] for i in range(size)}


@settings(deadline=None)
@given(dags(), st.data())
def test_a_step_is_opened_once_and_only_after_what_it_needs(
    edges: dict[str, list[str]], data: st.DataObject
) -> None:
    graph = graph_of(edges)
    given_steps = {n: ref() for n in data.draw(st.sets(st.sampled_from(sorted(edges))))}
    frontier = Frontier(graph, given_steps)
    opened: list[str] = []
    running: list[str] = []
    while not frontier.is_over:
        released = frontier.take()
        over = frontier.outputs.keys() | frontier.skipped.keys()
        must = {n for n in edges if n not in over and set(edges[n]) <= over}
        assert set(released) == must - set(running)
        opened += released
        running += released
        name = data.draw(st.sampled_from(sorted(running)))
        running.remove(name)
        if data.draw(st.booleans()):
            frontier.finish(name, ref())
        else:
            frontier.skip(name, "why not")
    assert sorted(opened) == sorted(edges.keys() - given_steps.keys())
    assert frontier.take() == []


def test_a_lost_output_holds_back_all_that_was_not_opened() -> None:
    graph = graph_of({"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c"]})
    frontier = Frontier(graph, {})
    assert frontier.take() == ["a"]
    frontier.finish("a", ref("old"))
    assert frontier.take() == ["b"]
    frontier.reopen(["a"], then="b")
    assert frontier.take() == ["a"]
    frontier.reopen(["a"], then="b")
    assert frontier.take() == []
    frontier.finish("a", ref("new"))
    assert frontier.take() == ["b"]
    frontier.finish("b", ref())
    assert frontier.take() == ["c"]
    assert frontier.outputs["a"].digest == "new"


@settings(deadline=None)
@given(dags(), st.data())
def test_losses_at_any_time_do_not_keep_a_run_from_its_end(
    edges: dict[str, list[str]], data: st.DataObject
) -> None:
    graph = graph_of(edges)
    frontier = Frontier(graph, {})
    running: list[str] = []
    losses = data.draw(st.integers(0, 6))
    while not frontier.is_over:
        released = frontier.take()
        assert not set(released) & set(running)
        for name in released:
            assert set(edges[name]) <= frontier.outputs.keys()
        running += released
        name = data.draw(st.sampled_from(sorted(running)))
        running.remove(name)
        lost = [n for n in edges[name] if losses and data.draw(st.booleans())]
        if lost:
            losses -= 1
            frontier.reopen(lost, then=name)
        else:
            frontier.finish(name, ref())
    assert not running
    assert frontier.outputs.keys() == edges.keys()
