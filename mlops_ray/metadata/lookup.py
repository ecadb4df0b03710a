"""What a person's words name in the lineage: ``flights@7``, a run, a step, a digest."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.lineage import Lineage, Node

_LEAST_DIGEST_LETTERS = 6
_LEAST_RUN_LETTERS = 8
_MOST_CANDIDATES = 8
_HEXADECIMAL = frozenset("0123456789abcdef")


def find(lineage: Lineage, thing: str) -> tuple[str, ...]:
    """Return the nodes that ``thing`` names.

    A run names all of its steps, a digest all steps that gave it. A view or a model without a version
    is its newest one. ``source:``, ``view:``, ``model:``, ``deployment:``, ``run:``, ``step:`` and
    ``artifact:`` before a name say which kind is meant; a project's name and a slash whose.

    Raises:
        MlopsRayError: There is no such thing, or there are several.
    """
    found = _candidates(lineage, thing)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise MlopsRayError(
            f"{thing!r} can mean {len(found)} things",
            fix=f"write one of: {', '.join(sorted(found)[:_MOST_CANDIDATES])}",
        )
    raise MlopsRayError(f"the ledger knows nothing called {thing!r}", fix=_hint(lineage, thing))


def _candidates(lineage: Lineage, thing: str) -> dict[str, tuple[str, ...]]:
    """Return the nodes by the exact name of each thing that may be meant."""
    if thing in lineage.nodes:
        return {thing: (thing,)}
    kind, colon, rest = thing.partition(":")
    wanted = kind if colon else ""
    name = rest if colon else thing
    found: dict[str, tuple[str, ...]] = {}
    if wanted in ("", "run"):
        found |= _runs(lineage, name)
    if wanted in ("", "step"):
        found |= _steps(lineage, name)
    if wanted in ("", "artifact"):
        found |= _artifacts(lineage, name)
    named = [node for node in lineage.nodes.values() if wanted in ("", node.kind)]
    return found | _named(named, name)


def _runs(lineage: Lineage, name: str) -> dict[str, tuple[str, ...]]:
    if name == "latest" and lineage.runs:
        name = max(lineage.runs)
    exact = [run for run in lineage.runs if run == name]
    close = [run for run in lineage.runs if run.startswith(name)]
    chosen = exact or (close if len(name) >= _LEAST_RUN_LETTERS else [])
    return {f"run:{run}": lineage.runs[run] for run in chosen}


def _steps(lineage: Lineage, name: str) -> dict[str, tuple[str, ...]]:
    run, slash, step = name.partition("/")
    if not slash:
        return {}
    return {
        node: (node,)
        for steps in _runs(lineage, run).values()
        for node in steps
        if node.partition("/")[2] == step
    }


def _artifacts(lineage: Lineage, name: str) -> dict[str, tuple[str, ...]]:
    if len(name) < _LEAST_DIGEST_LETTERS or not _HEXADECIMAL.issuperset(name):
        return {}
    found: dict[str, list[str]] = defaultdict(list)
    for node in lineage.nodes.values():
        digest = str(node.detail.get("digest", ""))
        if node.kind == "artifact" and digest.startswith(name):
            found[f"artifact:{digest}"].append(node.id)
    return {digest: tuple(nodes) for digest, nodes in found.items()}


def _named(nodes: Iterable[Node], name: str) -> dict[str, tuple[str, ...]]:
    """Find sources, views, models and deployments; of several versions the newest."""
    exact: dict[str, tuple[str, ...]] = {}
    newest: dict[str, tuple[int, str]] = {}
    for node in nodes:
        scoped = node.id.partition(":")[2]
        base, _, version = scoped.rpartition("@")
        if node.kind in ("step", "artifact"):
            continue
        if name in (scoped, node.name):
            exact[node.id] = (node.id,)
        elif name in (base, base.rpartition("/")[2]) and version.isdecimal():
            whole = f"{node.kind}:{base}"
            newest[whole] = max(newest.get(whole, (-1, "")), (int(version), node.id))
    return exact | {node: (node,) for _, node in newest.values()}


def _hint(lineage: Lineage, thing: str) -> str:
    known = sorted({n.name for n in lineage.nodes.values() if n.kind not in ("step", "artifact")})
    close = difflib.get_close_matches(thing, known, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "name a model (flights@7), a view (weather@14), a source, a run, RUN/STEP or a digest"
