"""A lineage as a picture: one SVG file that needs nothing else, light or dark as its reader is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from itertools import accumulate, pairwise
from typing import Any

from mlops_ray.metadata.layout import Layout, arrange
from mlops_ray.metadata.lineage import Lineage, Node

_CARD_WIDTH = 176.0
_CARD_HEIGHT = 42.0
_OUTPUT_HEIGHT = 18.0
_GAP_X = 20.0
_GAP_Y = 44.0
_MARGIN = 32.0
_TOP = 92.0
_LEAST_WIDTH = 700.0
_TITLE_LETTERS = 22
_DETAIL_LETTERS = 27
_KINDS = {
    "source": "source",
    "view": "feature view",
    "step": "step",
    "artifact": "artifact",
    "model": "model",
    "deployment": "deployment",
}
_STYLE = """
svg { --paper: #ffffff; --ink: #1b2430; --faint: #6b7684; --line: #b8c1cc; --card: #ffffff;
  --source: #0e7c86; --view: #2f855a; --step: #51606f; --artifact: #b7791f; --model: #6b46c1;
  --deployment: #c05621; --strip: #f7f2e6;
  font-family: ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --paper: #12171e; --ink: #e8edf3; --faint: #95a1af;
  --line: #3d4855; --card: #1b222b; --source: #4fd1d9; --view: #68d391; --step: #a7b4c2;
  --artifact: #ecc94b; --model: #b794f4; --deployment: #f6ad55; --strip: #262a2a; } }
.paper { fill: var(--paper); }
.title { font-size: 19px; font-weight: 650; fill: var(--ink); }
.said, .legend { font-size: 12px; fill: var(--faint); }
.edge { fill: none; stroke: var(--line); stroke-width: 1.5; }
.tip { fill: var(--line); }
.card { fill: var(--card); stroke: var(--line); }
.start .card { stroke: var(--own); stroke-width: 2.5; }
.bar { fill: var(--own); }
.strip { fill: var(--strip); }
.name { font-size: 13px; font-weight: 600; fill: var(--ink); }
.detail { font-size: 10.5px; fill: var(--faint); }
.made { font-size: 10.5px; fill: var(--artifact); font-family: ui-monospace, Menlo, monospace; }
.node:hover .card { stroke: var(--own); }
""" + "".join(f".{kind} {{ --own: var(--{kind}); }}\n" for kind in _KINDS)


def draw(
    lineage: Lineage,
    title: str,
    starts: Collection[str] = (),
    addresses: Mapping[str, str] | None = None,
) -> str:
    """Return an SVG document: what was used stands above what came of it.

    The same lineage gives the same bytes. Pointing at a node shows what is known of it.

    Args:
        lineage: What to draw. Best it is ``folded``: then an artifact stands on its step's card.
        title: The heading.
        starts: Nodes to emphasise.
        addresses: Where a click on a node leads, by its id.
    """
    room = dict.fromkeys(lineage.nodes, _CARD_WIDTH + _GAP_X)
    layout = arrange(lineage.nodes, lineage.edges, room)
    tops = _tops(lineage, layout)
    parts = [
        *(_edge(lineage.nodes, layout, tops, edge) for edge in sorted(layout.routes)),
        *(
            _node(node, _corner(layout, tops, name), name in starts, (addresses or {}).get(name))
            for name, node in sorted(lineage.nodes.items())
        ),
    ]
    width = max(2 * _MARGIN + layout.extent - _GAP_X, _LEAST_WIDTH)
    return _document(title, lineage, parts, width, tops[-1] - _GAP_Y + _MARGIN)


def _tops(lineage: Lineage, layout: Layout) -> list[float]:
    """Return where each layer begins, and where one more would."""
    heights = [0.0] * layout.layers
    for name, node in lineage.nodes.items():
        layer = layout.places[name][0]
        heights[layer] = max(heights[layer], _height(node))
    return list(accumulate((height + _GAP_Y for height in heights), initial=_TOP))


def _corner(layout: Layout, tops: list[float], name: str) -> tuple[float, float]:
    layer, middle = layout.places[name]
    return _across(middle) - _CARD_WIDTH / 2, tops[layer]


def _across(place: float) -> float:
    return _MARGIN - _GAP_X / 2 + place


def _document(title: str, lineage: Lineage, parts: list[str], width: float, height: float) -> str:
    count = (
        f"{len(lineage.nodes)} nodes, {len(lineage.edges)} edges; what is above made what is below"
    )
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path class="tip" d="M0 0L8 4L0 8Z"/></marker></defs>',
        f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
        f'<text class="title" x="{_MARGIN:g}" y="36">{escape(title)}</text>',
        f'<text class="said" x="{_MARGIN:g}" y="56">{count}</text>',
        _legend(lineage),
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _legend(lineage: Lineage) -> str:
    present = {node.kind for node in lineage.nodes.values()}
    if any("output" in node.detail for node in lineage.nodes.values()):
        present.add("artifact")
    kinds = [kind for kind in _KINDS if kind in present]
    parts, x = [], _MARGIN
    for kind in kinds:
        parts.append(
            f'<g class="{kind}"><rect class="bar" x="{x:g}" y="68" width="10" height="10" rx="2"/>'
            f'<text class="legend" x="{x + 15:g}" y="77">{_KINDS[kind]}</text></g>'
        )
        x += 30 + 6.6 * len(_KINDS[kind])
    return "".join(parts)


def _node(node: Node, corner: tuple[float, float], start: bool, address: str | None) -> str:
    height = _height(node)
    x, top = corner
    body = [
        f'<rect class="card" width="{_CARD_WIDTH:g}" height="{height:g}" rx="7"/>',
        f'<path class="bar" d="M7 0H5A5 5 0 0 0 0 5V{height - 5:g}A5 5 0 0 0 5 {height:g}H7Z"/>',
        f'<text class="name" x="16" y="18">{escape(_short(node.name, _TITLE_LETTERS))}</text>',
        f'<text class="detail" x="16" y="33">{escape(_subtitle(node))}</text>',
    ]
    if "output" in node.detail:
        body.append(_strip(node.detail["output"], height))
    told = escape("\n".join([node.id, *_lines(node.detail)]))
    group = (
        f'<g class="node {node.kind}{" start" if start else ""}" '
        f'transform="translate({x:.1f} {top:.1f})"><title>{told}</title>{"".join(body)}</g>'
    )
    return f'<a href="{escape(address)}">{group}</a>' if address else group


def _strip(output: Mapping[str, Any], height: float) -> str:
    top = height - _OUTPUT_HEIGHT
    right, low = _CARD_WIDTH - 0.75, height - 0.75
    shape = f"M7 {top:g}H{right:g}V{low - 6:g}A6 6 0 0 1 {right - 6:g} {low:g}H7Z"
    return (
        f'<path class="strip" d="{shape}"/>'
        f'<text class="made" x="16" y="{height - 5.5:g}">{escape(describe_output(output))}</text>'
    )


def _edge(
    nodes: Mapping[str, Node], layout: Layout, tops: list[float], edge: tuple[str, str]
) -> str:
    """Draw a smooth line from the foot of one card to the head of another."""
    route = layout.routes[edge]
    (first, x), (last, to_x) = route[0], route[-1]
    foot = tops[first] + _height(nodes[edge[0]])
    points = [(_across(x), foot)]
    if first < last:
        for layer, bend in route[1:-1]:
            points += [(_across(bend), tops[layer]), (_across(bend), tops[layer + 1] - _GAP_Y)]
    points.append((_across(to_x), tops[last]))
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (to_x, to_y) in pairwise(points):
        half = (y + to_y) / 2
        path += f"C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
    told = f"{nodes[edge[0]].name} → {nodes[edge[1]].name}"
    return (
        f'<path class="edge" d="{path}" marker-end="url(#tip)"><title>{escape(told)}</title></path>'
    )


def _height(node: Node) -> float:
    return _CARD_HEIGHT + (_OUTPUT_HEIGHT if "output" in node.detail else 0.0)


def _subtitle(node: Node) -> str:
    if node.kind == "step":
        return _short(str(node.detail["run"]), _DETAIL_LETTERS)
    return _short(
        f"{_KINDS[node.kind]} · {node.detail['project']}"
        if "project" in node.detail
        else _KINDS[node.kind],
        _DETAIL_LETTERS,
    )


def describe_output(output: Mapping[str, Any]) -> str:
    """Return an artifact in a few words: ``table 3f9a0c12 1.2 MiB``."""
    return f"{output['kind']} {str(output['digest'])[:8]} {_bytes(int(output['size']))}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _lines(detail: Mapping[str, Any], path: str = "") -> list[str]:
    found: list[str] = []
    for name, value in detail.items():
        if isinstance(value, Mapping):
            found += _lines(value, f"{path}{name}.")
        elif value is not None:
            found.append(f"{path}{name}: {value}")
    return found
