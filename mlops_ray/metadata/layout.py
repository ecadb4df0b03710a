"""Where to draw the nodes of a directed graph: in layers, one after the other, with few crossings.

After Sugiyama, Tagawa, Toda (1981): layers by the longest path, an order inside each layer by the
barycentre of the neighbours, then places that keep edges straight.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Edge = tuple[str, str]

_SWEEPS = 12
_BEND_ROOM = 14.0


@dataclass(frozen=True)
class Layout:
    """Middles of nodes (layer, place in it) and, for each edge, of all that it passes, with its ends.

    ``extent`` is how long the longest layer is.
    """

    places: Mapping[str, tuple[int, float]]
    routes: Mapping[Edge, tuple[tuple[int, float], ...]]
    layers: int
    extent: float


def arrange(nodes: Iterable[str], edges: Iterable[Edge], room: Mapping[str, float]) -> Layout:
    """Place a graph. The same graph gets the same places; nodes of a layer never overlap.

    Args:
        nodes: The nodes.
        edges: From earlier layers to later ones. One that would close a cycle is drawn backwards; one
            from a node to itself has no route.
        room: How much each node takes in its layer, margins included.
    """
    names, wanted = sorted(nodes), sorted({(a, b) for a, b in edges if a != b})
    backward = _backward(names, wanted)
    forward = {(a, b): (b, a) if (a, b) in backward else (a, b) for a, b in wanted}
    layer = _layers(names, sorted(set(forward.values())))
    routes = {edge: _route(*forward[edge], layer) for edge in wanted}
    order, links = _with_bends(layer, sorted(set(routes.values())))
    _untangle(order, links)
    room = defaultdict(lambda: _BEND_ROOM, room)
    place = _straighten(order, links, room)
    places = {name: (layer[name], place[name]) for name in names}
    index = {name: number for number, names_ in enumerate(order) for name in names_}
    paths = {
        edge: tuple((index[n], place[n]) for n in (route if forward[edge] == edge else route[::-1]))
        for edge, route in routes.items()
    }
    extent = max((place[n] + room[n] / 2 for row in order for n in row), default=0.0)
    return Layout(places, paths, len(order), extent)


def crossings(order: Sequence[Sequence[str]], links: Iterable[Edge]) -> int:
    """Count the pairs of links between neighbouring layers that cross."""
    place = {name: number for layer in order for number, name in enumerate(layer)}
    layer_of = {name: number for number, layer in enumerate(order) for name in layer}
    by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for source, target in links:
        by_layer[layer_of[source]].append((place[source], place[target]))
    return sum(_inversions(sorted(pairs)) for pairs in by_layer.values())


def _inversions(pairs: list[tuple[int, int]]) -> int:
    seen: list[int] = []
    count = 0
    for _, target in pairs:
        count += len(seen) - bisect_right(seen, target)
        insort(seen, target)
    return count


def _backward(names: list[str], edges: Iterable[Edge]) -> set[Edge]:
    """Return edges without which there is no cycle: those that lead back in a depth-first walk."""
    below: dict[str, list[str]] = defaultdict(list)
    for source, target in sorted(edges):
        below[source].append(target)
    state: dict[str, int] = {}
    found: set[Edge] = set()
    for root in names:
        stack = [(root, iter(below[root]))] if root not in state else []
        state.setdefault(root, 1)
        while stack:
            node, rest = stack[-1]
            for target in rest:
                if state.get(target) == 1:
                    found.add((node, target))
                elif target not in state:
                    state[target] = 1
                    stack.append((target, iter(below[target])))
                    break
            else:
                state[node] = 2
                stack.pop()
    return found


def _layers(names: list[str], edges: list[Edge]) -> dict[str, int]:
    """Return the longest path to each node, then move each as near as can be to what it leads to.

    Else all that begins in the same place would stand in one long layer.
    """
    above: dict[str, list[str]] = defaultdict(list)
    below: dict[str, list[str]] = defaultdict(list)
    for source, target in edges:
        above[target].append(source)
        below[source].append(target)
    layer: dict[str, int] = {}
    waiting = {name: len(above[name]) for name in names}
    ready = [name for name in names if not waiting[name]]
    for name in ready:
        layer[name] = max((layer[other] + 1 for other in above[name]), default=0)
        for target in below[name]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    for name in reversed(ready):
        if below[name]:
            layer[name] = min(layer[other] for other in below[name]) - 1
    return layer


def _route(source: str, target: str, layer: Mapping[str, int]) -> tuple[str, ...]:
    """Return the ends of an edge and its bends: one in each layer between."""
    between = range(layer[source] + 1, layer[target])
    return (source, *(f"{source}\0{target}\0{number}" for number in between), target)


def _with_bends(
    layer: Mapping[str, int], routes: Iterable[tuple[str, ...]]
) -> tuple[list[list[str]], list[Edge]]:
    order: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for name in layer:
        order[layer[name]].append(name)
    links = []
    for route in routes:
        for offset, bend in enumerate(route[1:-1], 1):
            order[layer[route[0]] + offset].append(bend)
        links += list(pairwise(route))
    return order, links


def _untangle(order: list[list[str]], links: list[Edge]) -> None:
    """Sort each layer by the mean place of its neighbours, to and fro; keep the best order."""
    left, right = _sides(links)
    best, least = [list(layer) for layer in order], crossings(order, links)
    for sweep in range(_SWEEPS):
        rightward = sweep % 2 == 0
        neighbours = left if rightward else right
        for number in range(len(order)) if rightward else range(len(order) - 1, -1, -1):
            beside = number - 1 if rightward else number + 1
            if 0 <= beside < len(order):
                _sort_layer(order[number], order[beside], neighbours)
        count = crossings(order, links)
        if count < least:
            best, least = [list(layer) for layer in order], count
        if not least:
            break
    order[:] = best


def _sort_layer(layer: list[str], beside: list[str], neighbours: Mapping[str, list[str]]) -> None:
    place = {name: number for number, name in enumerate(beside)}
    own = {name: number for number, name in enumerate(layer)}

    def middle(name: str) -> tuple[float, int]:
        found = [place[other] for other in neighbours.get(name, ())]
        return (sum(found) / len(found) if found else own[name]), own[name]

    layer.sort(key=middle)


def _straighten(
    order: list[list[str]], links: list[Edge], room: Mapping[str, float]
) -> dict[str, float]:
    """Move nodes towards the middle of their neighbours without changing any order."""
    left, right = _sides(links)
    place: dict[str, float] = {}
    for layer in order:
        total = 0.0
        for name in layer:
            place[name] = total + room[name] / 2
            total += room[name]
    for sweep in range(2 * _SWEEPS):
        rightward = sweep % 2 == 0
        sides = (left, right) if sweep >= 2 * _SWEEPS - 4 else (left if rightward else right,)
        for layer in order if rightward else reversed(order):
            _settle(layer, place, sides, room)
    top = min((place[name] - room[name] / 2 for layer in order for name in layer), default=0.0)
    return {name: value - top for name, value in place.items()}


def _settle(
    layer: list[str],
    place: dict[str, float],
    sides: Sequence[Mapping[str, list[str]]],
    room: Mapping[str, float],
) -> None:
    """Give a layer the places nearest to its wishes, in squares, that keep nodes apart.

    Seen from the end of the room before it, each node's wish has to be no less than the one before:
    isotonic regression, by pooling neighbours that violate it.
    """
    pools: list[tuple[float, int]] = []
    offsets, total = [], 0.0
    for name in layer:
        offsets.append(total + room[name] / 2)
        total += room[name]
        found = [place[other] for side in sides for other in side.get(name, ())]
        wish = sum(found) / len(found) if found else place[name]
        pools.append((wish - offsets[-1], 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2], pools[-1]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    shifts = [shift for shift, count in pools for _ in range(count)]
    for name, offset, shift in zip(layer, offsets, shifts, strict=True):
        place[name] = offset + shift


def _sides(links: Iterable[Edge]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    left: dict[str, list[str]] = defaultdict(list)
    right: dict[str, list[str]] = defaultdict(list)
    for source, target in links:
        left[target].append(source)
        right[source].append(target)
    return left, right
