"""Pictures of lineage: where nodes go, and a file that a browser can read."""

from __future__ import annotations

from itertools import combinations, pairwise
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from metadata.lineage_world import World

from mlops_ray.metadata.drawing import draw
from mlops_ray.metadata.layout import arrange, crossings
from mlops_ray.metadata.lineage import Lineage, Node, build

NAMES = "abcdefghij"
SVG = "{http://www.w3.org/2000/svg}"
edges = st.frozensets(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=24)


def lineage(days: int) -> Lineage:
    world = World()
    for day in range(days):
        world.day(day)
    return build(world.runs, world.steps, world.links, world.parts).folded()


@given(edges)
def test_nodes_keep_their_distance_and_edges_lead_onward(
    found: frozenset[tuple[str, str]],
) -> None:
    heights = {name: 20.0 + 5 * number for number, name in enumerate(NAMES)}
    layout = arrange(NAMES, found, heights)
    assert set(layout.places) == set(NAMES)
    for one, other in combinations(NAMES, 2):
        (layer, y), (other_layer, other_y) = layout.places[one], layout.places[other]
        if layer == other_layer:
            assert abs(y - other_y) >= (heights[one] + heights[other]) / 2 - 1e-6
    for name, (layer, y) in layout.places.items():
        assert 0 <= layer < layout.layers
        assert y - heights[name] / 2 >= -1e-6
        assert y + heights[name] / 2 <= layout.extent + 1e-6
    for (source, target), route in layout.routes.items():
        assert route[0] == layout.places[source]
        assert route[-1] == layout.places[target]
        step = {b[0] - a[0] for a, b in pairwise(route)}
        assert step in ({1}, {-1})


@given(edges)
def test_without_cycles_every_edge_leads_onward(found: frozenset[tuple[str, str]]) -> None:
    acyclic = {(a, b) for a, b in found if a < b}
    layout = arrange(NAMES, acyclic, dict.fromkeys(NAMES, 10.0))
    assert all(layout.places[a][0] < layout.places[b][0] for a, b in acyclic)
    assert layout == arrange(reversed(NAMES), acyclic, dict.fromkeys(NAMES, 10.0))


@given(edges)
def test_crossings_are_counted_as_by_hand(found: frozenset[tuple[str, str]]) -> None:
    order = [list("abcde"), list("fghij")]
    links = [(a, b) for a, b in found if a in "abcde" and b in "fghij"]
    by_hand = sum(
        (a < c and b > d) or (a > c and b < d) for (a, b), (c, d) in combinations(links, 2)
    )
    assert crossings(order, links) == by_hand


def test_a_tangle_that_can_be_undone_is_undone() -> None:
    pairs = [("a", "j"), ("b", "i"), ("c", "h"), ("d", "g"), ("e", "f")]
    layout = arrange(NAMES, pairs, dict.fromkeys(NAMES, 10.0))
    left = sorted("abcde", key=lambda name: layout.places[name][1])
    right = sorted("fghij", key=lambda name: layout.places[name][1])
    assert crossings([left, right], pairs) == 0


def test_a_chain_is_drawn_straight() -> None:
    layout = arrange("abcd", list(pairwise("abcd")), dict.fromkeys("abcd", 30.0))
    assert len({y for _, y in layout.places.values()}) == 1


def test_the_picture_holds_every_node_once_and_every_edge() -> None:
    graph = lineage(3)
    text = draw(
        graph, "Lineage of <flights> & more", ["model:flights@3"], {"model:flights@3": "a&b"}
    )
    root = ElementTree.fromstring(text)
    groups = [g for g in root.iter(f"{SVG}g") if "node" in g.get("class", "").split()]
    ids = {(g.findtext(f"{SVG}title") or "").splitlines()[0] for g in groups}
    assert len(groups) == len(graph.nodes)
    assert ids == set(graph.nodes)
    drawn = [p for p in root.iter(f"{SVG}path") if p.get("class") == "edge"]
    assert len(drawn) == len(graph.edges)
    assert sum("start" in g.get("class", "").split() for g in groups) == 1
    (link,) = root.iter(f"{SVG}a")
    assert link.get("href") == "a&b"
    assert root.findtext(f"{SVG}title") == "Lineage of <flights> & more"


def test_cards_lie_inside_the_picture_and_apart() -> None:
    root = ElementTree.fromstring(draw(lineage(20), "many"))
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    boxes = []
    for group in root.iter(f"{SVG}g"):
        if "node" not in group.get("class", "").split():
            continue
        x, y = map(float, group.get("transform", "")[len("translate(") : -1].split())
        card = next(group.iter(f"{SVG}rect"))
        boxes.append((x, y, x + float(card.get("width", "0")), y + float(card.get("height", "0"))))
    assert len(boxes) > 250
    assert all(x >= 0 and y >= 60 and r <= width and b <= height for x, y, r, b in boxes)
    for (x, y, r, b), (x2, y2, r2, b2) in combinations(boxes, 2):
        assert r <= x2 or r2 <= x or b <= y2 or b2 <= y


def test_nothing_to_draw_is_still_a_picture() -> None:
    alone = Lineage({"source:x": Node("source:x", "source", "x")}, frozenset())
    assert "x" in draw(alone, "alone")
    ElementTree.fromstring(draw(Lineage({}, frozenset()), "none"))


def test_the_same_lineage_gives_the_same_bytes() -> None:
    assert draw(lineage(2), "t") == draw(lineage(2), "t")
