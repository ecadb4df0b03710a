"""Requests answered with every feature on: against a bare Ray Serve handler and other servers."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._peers import Worker
from benchmarks._serving_load import Found, Target, load, write_script
from benchmarks._serving_ray_work import BARE
from benchmarks._serving_servers import DIRECT, Servers, ask, serve
from benchmarks._serving_world import World, make

REPEATS = 5
CHECKED = 50
TOLERANCE = 1e-4
RATE_PER_S = 100
SETTLING_S = 1.0

NAMES = {
    BARE: "full_vs_bare",
    "uvicorn": "vs_uvicorn",
    "bentoml": "vs_bentoml",
    "litserve": "vs_litserve",
    "mlflow_serve": "vs_mlflow",
    "serve_default": "vs_serve_default",
}


@dataclass(frozen=True)
class Size:
    """How much is measured; a case is (connections, rows of a request)."""

    entities: int = 4_000
    cases: tuple[tuple[int, int], ...] = ((1, 1), (16, 1), (64, 1), (1, 32), (16, 32), (64, 32))
    warm_ups: int = 1
    repeats: int = REPEATS
    duration_s: int = 2
    changes: int = REPEATS
    block_s: float = 4.0


QUICK = Size(500, ((1, 1), (16, 1)), 0, 1, duration_s=1, changes=1, block_s=2.0)


@dataclass
class Case:
    """What the servers showed with so many connections and rows, round by round."""

    connections: int
    rows: int
    found: dict[str, list[Found]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"c{self.connections}_r{self.rows}"

    def median(self, server: str, what: str) -> float:
        return statistics.median(getattr(found, what) for found in self.found[server])

    def ratio(self, server: str) -> float:
        """Our throughput by theirs: the median of the rounds, in each of which both had a turn."""
        pairs = zip(self.found["ours"], self.found[server], strict=True)
        return statistics.median(ours.per_s / theirs.per_s for ours, theirs in pairs)


def run(*, quick: bool) -> list[dict[str, Any]]:
    """Each server is one process or replica with the same model; all are up and take turns.

    Ours validates the request, looks up 24 features of three entities in LMDB and computes three more,
    sends a tenth of the customers to a challenger, logs every answer, counts, and checks a token. The
    others are sent all 27 features as numbers, parse and predict. ``quick`` starts no other server than
    the bare handler: to install their environments takes minutes. ``full_vs_bare`` is the worst of all
    cases, and so are the others; of BentoML, LitServe and MLflow the cases with one connection are
    apart (``…_one``). A case's speedup is the median of the rounds' ratios; beside it, p50, p99 and the
    processor time of all processes of the server for each request. Before it is measured, each server
    must give the model's own scores; one failed request ends the benchmark. Last, models change and
    replicas are replaced under 100 requests a second; the p99 of those times is set against the p99
    of times like them with no change.
    """
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        world = make(Path(name), size.entities, sorted({rows for _, rows in size.cases}))
        with serve(world, peers=not quick) as servers:
            for target in servers.targets.values():
                _check(target, world)
            cases = _measure(servers, world, size)
            changes = _change(servers, world, size)
    return [*_headlines(cases), *_details(cases), *_latency(cases), *changes]


def _check(target: Target, world: World) -> None:
    """Compare a server's scores with those of the models alone."""
    models = [torch.jit.load(str(world.script(version))) for version in (1, 2)]
    rows = min(int(path.stem.rpartition("_")[2]) for path in world.folder.glob("ours_*.jsonl"))
    asked = world.bodies(target.bodies, rows).read_bytes().splitlines()[:CHECKED]
    features = world.bodies("features", rows).read_bytes().splitlines()[:CHECKED]
    for body, line in zip(asked, features, strict=True):
        inputs = torch.tensor(json.loads(line)["inputs"])
        wanted = [model(inputs).numpy() for model in models]
        found = _scores(ask(target, body))
        # Ours lets the challenger answer some.
        allowed = wanted if target.bodies == "ours" else wanted[:1]
        if not any(np.allclose(found, scores, rtol=0, atol=TOLERANCE) for scores in allowed):
            raise RuntimeError(f"{target.name} answers {found}, the model {wanted[0]}")


def _scores(answer: Any) -> list[float]:
    if isinstance(answer, dict):
        answer = answer.get("scores", answer.get("predictions"))
    scores: list[float] = answer
    return scores


def _measure(servers: Servers, world: World, size: Size) -> list[Case]:
    script = write_script(world.folder)
    targets = list(servers.targets.values())
    cases = []
    for connections, rows in size.cases:
        case = Case(connections, rows, {target.name: [] for target in targets})
        for turn in range(-size.warm_ups, size.repeats):
            # In each round, another server begins.
            duration_s = 1 if turn < 0 else size.duration_s
            first = turn % len(targets)
            for target in targets[first:] + targets[:first]:
                bodies = world.bodies(target.bodies, rows)
                found = load(target, script, bodies, connections, duration_s)
                if turn >= 0:
                    case.found[target.name].append(found)
        print(_described(case), file=sys.stderr, flush=True)
        cases.append(case)
    return cases


def _described(case: Case) -> str:
    lines = [f"{case.connections} connections, {case.rows} rows:"]
    for server, found in case.found.items():
        figures = [case.median(server, what) for what in Found.__dataclass_fields__]
        spread = max(f.per_s for f in found) - min(f.per_s for f in found)
        lines.append(
            "  {:14}{:9.1f}/s (spread {:7.1f})  p50 {:8.2f} ms  p99 {:8.2f} ms  {:7.0f} µs of CPU"
            "  ours / it {:6.2f}".format(
                server, figures[0], spread, *figures[1:], case.ratio(server)
            )
        )
    return "\n".join(lines)


def _headlines(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for server, metric in _names(cases).items():
        apart = server in ("bentoml", "litserve", "mlflow_serve")
        several = [case for case in cases if case.connections > 1 or not apart]
        results.append(_worst(metric, server, several))
        if apart:
            single = [case for case in cases if case.connections == 1]
            results.append(_worst(f"{metric}_one", server, single))
    return results


def _worst(metric: str, server: str, cases: list[Case]) -> dict[str, Any]:
    case = min(cases, key=lambda case: case.ratio(server))
    return _compared(metric, server, case) | {"case": case.name}


def _details(cases: list[Case]) -> list[dict[str, Any]]:
    names = _names(cases)
    return [_compared(f"{m}_{case.name}", s, case) for case in cases for s, m in names.items()]


def _names(cases: list[Case]) -> dict[str, str]:
    return {server: metric for server, metric in NAMES.items() if server in cases[0].found}


def _compared(metric: str, server: str, case: Case) -> dict[str, Any]:
    ours = [found.per_s for found in case.found["ours"]]
    more: dict[str, float] = {}
    for what in ("p50_ms", "p99_ms", "cpu_us"):
        more |= {what: case.median("ours", what), f"peer_{what}": case.median(server, what)}
    return {
        "metric": metric,
        "value": statistics.median(ours),
        "spread": max(ours) - min(ours),
        "unit": "1/s",
        "peer": "bare Serve" if server == BARE else server,
        "peer_value": case.median(server, "per_s"),
        "speedup": case.ratio(server),
        **more,
    }


def _latency(cases: list[Case]) -> list[dict[str, Any]]:
    """Return our latencies and processor time, and how much longer 32 rows take than one."""
    results = [
        _row(f"{what}_{case.name}", _all(case, what), what.rpartition("_")[2])
        for case in cases
        for what in ("p50_ms", "p99_ms", "cpu_us")
    ]
    alone = {case.rows: case for case in cases if case.connections == 1}
    if {1, 32} <= alone.keys():
        pairs = zip(alone[32].found["ours"], alone[1].found["ours"], strict=True)
        results.append(_row("rows32_by_row1", [many.p50_ms / one.p50_ms for many, one in pairs]))
    for case in cases:
        if "uvicorn" in case.found:
            pairs = zip(case.found[DIRECT], case.found["uvicorn"], strict=True)
            ratios = [ours.per_s / theirs.per_s for ours, theirs in pairs]
            results.append(_row(f"direct_vs_uvicorn_{case.name}", ratios))
    return results


def _all(case: Case, what: str) -> list[float]:
    return [getattr(found, what) for found in case.found["ours"]]


def _change(servers: Servers, world: World, size: Size) -> list[dict[str, Any]]:
    """Change what is served under load: models in place, and replicas for new ones."""
    ours = servers.targets["ours"]
    bodies = world.bodies("ours", 1)
    arguments = [str(ours.port), ours.path, str(bodies), str(RATE_PER_S), ours.token]
    blocks: dict[str, list[tuple[float, float]]] = {"quiet": [], "swap": [], "restart": []}
    with Worker(None, "_serving_rate.py", *arguments) as rate:
        rate("start")
        time.sleep(SETTLING_S)
        for number in range(size.changes):
            champion = 2 - number % 2
            for what in ("quiet", "swap"):
                began_s = time.monotonic()
                if what == "swap":
                    servers.ray("swap", champion)
                time.sleep(max(0.0, began_s + size.block_s - time.monotonic()))
                blocks[what].append((began_s, time.monotonic()))
            _check_champion(ours, bodies, champion)
        began_s = time.monotonic()
        servers.ray("restart")
        time.sleep(SETTLING_S)
        blocks["restart"].append((began_s, time.monotonic()))
        sent = rate("stop")
    return _changed(sent, blocks)


def _changed(sent: list[Any], blocks: Mapping[str, list[tuple[float, float]]]) -> list[Any]:
    taken_ms: dict[str, list[float | None]] = {
        what: [ms for due_s, ms in sent if any(a <= due_s < b for a, b in times)]
        for what, times in blocks.items()
    }
    p99_ms = {
        what: float(np.percentile([ms for ms in times if ms is not None], 99))
        for what, times in taken_ms.items()
    }
    results = [_row("quiet_p99_ms", [p99_ms["quiet"]], "ms")]
    for what in ("swap", "restart"):
        failed = sum(ms is None for ms in taken_ms[what])
        results += [
            _row(f"{what}_failed", [failed]) | {"requests": len(taken_ms[what])},
            _row(f"{what}_p99_ms", [p99_ms[what]], "ms"),
            _row(f"{what}_p99_ratio", [p99_ms[what] / p99_ms["quiet"]]),
        ]
    return results


def _check_champion(ours: Target, bodies: Path, champion: int) -> None:
    """Most requests must be answered by the new champion as soon as a swap is over."""
    asked = bodies.read_bytes().splitlines()[:CHECKED]
    answers = [ask(ours, body)["version"] for body in asked]
    if answers.count(champion) < CHECKED / 2:
        raise RuntimeError(f"after the swap to version {champion}, answers come from {answers}")


def _row(metric: str, values: list[float], unit: str = "") -> dict[str, Any]:
    return {
        "metric": metric,
        "value": statistics.median(values),
        "spread": max(values) - min(values),
        "unit": unit,
        "peer": None,
        "peer_value": None,
        "speedup": None,
    }
