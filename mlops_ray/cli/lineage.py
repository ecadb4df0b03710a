"""The verb ``lineage``: what a thing was made from, and what was made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from rich.tree import Tree

    from mlops_ray.metadata.lineage import Direction, Lineage, Node

_DEPTH = 24
_STYLES = {
    "source": "cyan",
    "view": "green",
    "step": "bold",
    "artifact": "yellow",
    "model": "magenta",
    "deployment": "dark_orange",
}


@click.command(short_help="Show what a thing was made from, and what was made from it.")
@click.argument("thing")
@click.option("--up", is_flag=True, help="Only what it was made from.")
@click.option("--down", is_flag=True, help="Only what was made from it.")
@click.option("--depth", type=click.IntRange(1), help=f"Edges away at most  [tree: {_DEPTH}]")
@click.option("--json", "as_json", is_flag=True, help="Print nodes and edges as JSON.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw to this file.")
def lineage(
    thing: str, up: bool, down: bool, depth: int | None, as_json: bool, svg: Path | None
) -> None:
    """Show what THING was made from and what was made from it.

    THING is a model (flights@7, flights@champion), a view (weather@14, weather), a source, a
    deployment, a run (latest, or how its name begins), RUN/STEP, or how an artifact's digest begins.
    Where a name is used for several things, write source:weather or view:weather.
    """
    from rich.console import Console

    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.lineage import read_lineage
    from mlops_ray.metadata.lookup import find

    home = _home()
    whole = read_lineage(open_ledger(home))
    starts = find(whole, _version(home, thing))
    directions: list[Direction] = ["up", "down"]
    if up != down:
        directions = ["up" if up else "down"]
    if as_json:
        found = whole.around(starts, directions, depth)
        click.echo(json.dumps({"starts": sorted(starts)} | found.to_json(), indent=2))
        return
    # People see an artifact with the step that made it.
    graph = whole.folded()
    shown = tuple(sorted({_maker(graph, start) for start in starts}))
    if svg is not None:
        _draw(home, graph.around(shown, directions, depth), thing, shown, svg)
    else:
        Console().print(_trees(graph, shown, directions, depth or _DEPTH))


def _home() -> Home:
    home = Home(default_home())
    if home.storage.ledger is None and not (home.root / "ledger.db").is_file():
        raise MlopsRayError(
            "nothing has run here yet",
            where=str(home.root),
            fix="run a workflow first, go to the project's folder, or set MLOPS_RAY_HOME",
        )
    return home


def _version(home: Home, thing: str) -> str:
    """Replace an alias of a model by the version that it names now."""
    kind, colon, rest = thing.rpartition(":")
    name, _, which = rest.partition("@")
    if not which or which.isdecimal() or kind not in ("", "model"):
        return thing
    from mlops_ray.registry.registry import Registry

    version = Registry(home).find(rest)
    return f"{kind}{colon}{name}@{version.version}" if version else thing


def _maker(folded: Lineage, node: str) -> str:
    return node if node in folded.nodes else f"step:{node.partition(':')[2]}"


def _draw(home: Home, found: Lineage, thing: str, starts: tuple[str, ...], file: Path) -> None:
    from mlops_ray.metadata.drawing import draw

    addresses: dict[str, str] = {}
    for node in found.nodes.values():
        if node.kind == "step":
            run, step = str(node.detail["run"]), str(node.detail["step"])
            log = home.run(run) / "logs" / f"{step}.log"
            addresses |= {node.id: log.as_uri()} if log.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(draw(found, f"Lineage of {thing}", starts, addresses), encoding="utf-8")
    click.echo(f"{file}: {len(found.nodes)} nodes, {len(found.edges)} edges")


def _trees(
    graph: Lineage, starts: tuple[str, ...], directions: list[Direction], depth: int
) -> RenderableType:
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    parts: list[RenderableType] = []
    for direction in directions:
        heading = "made from" if direction == "up" else "used for"
        seen: set[str] = set()
        for start in starts:
            title = Text.assemble(_label(graph.nodes[start]), (f"  {heading}", "dim"))
            tree = Tree(title)
            _grow(tree, graph, start, direction, depth, seen)
            parts.append(tree if tree.children else Text.assemble(title, (" nothing", "dim")))
    return Group(*parts)


def _grow(
    tree: Tree, graph: Lineage, node: str, direction: Direction, depth: int, seen: set[str]
) -> None:
    """Add what lies beyond a node; what was shown above has an arrow and is not shown again."""
    from rich.text import Text

    neighbours = (graph.up if direction == "up" else graph.down).get(node, ())
    seen.add(node)
    if depth == 0 and neighbours:
        tree.add(Text(f"… {len(neighbours)} more: --depth", "dim"))
        return
    for other in neighbours:
        if other in seen and (graph.up if direction == "up" else graph.down).get(other):
            tree.add(Text.assemble(_label(graph.nodes[other], short=True), (" ↑", "dim")))
        else:
            branch = tree.add(_label(graph.nodes[other]))
            _grow(branch, graph, other, direction, depth - 1, seen)


def _label(node: Node, *, short: bool = False) -> Text:
    from rich.text import Text

    from mlops_ray.metadata.drawing import describe_output

    style = _STYLES[node.kind]
    if node.kind != "step":
        return Text.assemble((f"{node.kind} ", "dim"), (node.name, style))
    label = Text.assemble((node.name, style), (f" {node.detail['run']}", "dim"))
    if "output" in node.detail and not short:
        label.append(f" → {describe_output(node.detail['output'])}", "yellow")
    return label
