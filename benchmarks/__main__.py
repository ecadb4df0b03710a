"""``python -m benchmarks [NAME] [--quick] [--json]``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules([str(HERE)]) if not m.name.startswith("_"))


def show(results: list[dict[str, Any]]) -> None:
    print(f"{'metric':28} {'ours':>12} {'peer':>12} {'unit':6} {'speedup':>8}  peer")
    for row in results:
        peer = f"{row['peer_value']:12.4g}" if row["peer_value"] is not None else " " * 12
        gain = f"{row['speedup']:8.2f}" if row["speedup"] is not None else " " * 8
        spread = f"  spread {row['spread']:.4g}" if row.get("spread") is not None else ""
        print(
            f"{row['metric']:28} {row['value']:12.4g} {peer} {row['unit']:6} {gain}  "
            f"{row['peer'] or ''}{spread}"
        )


def commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names())
    parser.add_argument("--quick", action="store_true", help="a reduced size, to keep it alive")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    given = parser.parse_args()
    if given.name is None:
        for name in names():
            headline = (importlib.import_module(f"benchmarks.{name}").__doc__ or "").splitlines()[0]
            print(f"{name:16} {headline}")
        return
    results = importlib.import_module(f"benchmarks.{given.name}").run(quick=given.quick)
    show(results)
    if given.json:
        machine = {"system": platform.platform(), "processor": platform.machine()}
        report = {"benchmark": given.name, "commit": commit(), "machine": machine}
        print(json.dumps(report | {"results": results}))


if __name__ == "__main__":
    main()
