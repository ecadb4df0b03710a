"""The verb ``logs``: what the steps of a run printed and what happened, also while it happens."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from mlops_ray.metadata.ledger import Ledger
    from mlops_ray.metadata.records import RunRecord

_LOOK_EVERY_S = 0.2
_NOT_OVER = ("pending", "running")
_MOST_RUNS = 10_000


@click.command(short_help="Show what a run's steps printed, or its events.")
@click.argument("run")
@click.argument("step", required=False)
@click.option("--item", type=click.IntRange(0), help="Only this call of a mapped step.")
@click.option("-f", "--follow", is_flag=True, help="Go on until it is over.")
@click.option("--events", is_flag=True, help="Show events instead, as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Print each line as JSON.")
def logs(
    run: str, step: str | None, item: int | None, follow: bool, events: bool, as_json: bool
) -> None:
    """Show what the steps of a run printed: all of them, or one.

    RUN is a run id, how one begins, or latest. STEP is a step, or a nested workflow for all of its
    steps. Lines of several steps or calls begin with whose they are.
    """
    from mlops_ray.metadata.access import open_ledger

    if item is not None and step is None:
        raise click.UsageError("--item needs the step that it is a call of")
    home = Home(default_home())
    if home.storage.ledger is None and not (home.root / "ledger.db").is_file():
        raise MlopsRayError("nothing has run here yet", where=str(home.root))
    ledger = open_ledger(home)
    record = find_run(ledger, run)
    _check_step(ledger, record, step)
    if events:
        lines = _events(ledger, record, step, item, follow)
    else:
        lines = _output(home, ledger, record, step, item, follow, as_json)
    try:
        for line in lines:
            click.echo(line)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def find_run(ledger: Ledger, text: str) -> RunRecord:
    """Return the run that a person means: its id, the unique beginning of one, or ``latest``.

    Raises:
        MlopsRayError: There is none, or there are several.
    """
    if text == "latest":
        newest = ledger.runs(limit=1)
        if not newest:
            raise MlopsRayError("nothing has run here yet")
        return newest[0]
    exact = ledger.run(text)
    if exact is not None:
        return exact
    found = [run for run in ledger.runs(limit=_MOST_RUNS) if run.run_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(run.run_id for run in found[:5])
        raise MlopsRayError(f"{len(found)} runs begin with {text!r}", fix=f"write more of: {names}")
    raise MlopsRayError(f"there is no run {text!r}", fix="list them: mlops-ray status")


def _check_step(ledger: Ledger, run: RunRecord, step: str | None) -> None:
    names = [record.name for record in ledger.steps(run.run_id)]
    if any(_belongs(name, step) for name in names) or step is None:
        return
    close = difflib.get_close_matches(step, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"its steps are: {', '.join(names)}"
    raise MlopsRayError(f"run {run.run_id} has no step {step!r}", fix=hint)


def _output(
    home: Home,
    ledger: Ledger,
    run: RunRecord,
    step: str | None,
    item: int | None,
    follow: bool,
    as_json: bool,
) -> Iterator[str]:
    """Yield the lines that were printed; with ``follow``, until what was asked for is over."""
    order = {record.name: record.position for record in ledger.steps(run.run_id)}
    tails: dict[tuple[str, int], _Tail] = {}

    def new_lines(last: bool) -> Iterator[str]:
        for whose, path in _files(home, run.run_id, step, item, order):
            tail = tails.setdefault(whose, _Tail(path))
            for line in tail.lines(last):
                alone = whose == (step, -1) or item is not None
                yield _shown(whose, line, alone, as_json)

    if not follow:
        yield from new_lines(True)
        return
    yield from _until(lambda: _is_over(ledger, run.run_id, step, item), new_lines)


def _files(
    home: Home, run_id: str, step: str | None, item: int | None, order: dict[str, int]
) -> list[tuple[tuple[str, int], Path]]:
    """Return whose each kept file is, and the file, in the order of the plan."""
    from mlops_ray.orchestration.capture import log_path

    if step is not None and item is not None:
        path = log_path(home, run_id, step, item)
        return [((step, item), path)] if path.is_file() else []
    folder = log_path(home, run_id, "any").parent
    found = []
    for path in folder.rglob("*.log"):
        name = path.relative_to(folder).with_suffix("").as_posix()
        parent, _, last = name.rpartition("/")
        whose = (parent, int(last)) if name not in order and last.isdigit() else (name, -1)
        if _belongs(whose[0], step):
            found.append((whose, path))
    return sorted(found, key=lambda pair: (order.get(pair[0][0], len(order)), pair[0]))


def _shown(whose: tuple[str, int], line: str, alone: bool, as_json: bool) -> str:
    name, item = whose
    if as_json:
        return json.dumps({"step": name, **({"item": item} if item >= 0 else {}), "line": line})
    if alone:
        return line
    return f"{name}[{item}] | {line}" if item >= 0 else f"{name} | {line}"


def _events(
    ledger: Ledger, run: RunRecord, step: str | None, item: int | None, follow: bool
) -> Iterator[str]:
    """Yield a run's events as JSON lines; with ``follow``, until what was asked for is over."""
    after = 0

    def new_lines(_last: bool) -> Iterator[str]:
        nonlocal after
        for event in ledger.events(run_id=run.run_id, after=after):
            after = max(after, event.id)
            if _belongs(event.step or "", step) and (
                item is None or event.data.get("item") == item
            ):
                yield event.model_dump_json()

    if not follow:
        yield from new_lines(True)
        return
    yield from _until(lambda: _is_over(ledger, run.run_id, step, item), new_lines)


def _until(over: Callable[[], bool], new_lines: Callable[[bool], Iterator[str]]) -> Iterator[str]:
    while True:
        # Looked at before reading: what was written up to then is read below.
        last = over()
        yield from new_lines(last)
        if last:
            return
        time.sleep(_LOOK_EVERY_S)


def _is_over(ledger: Ledger, run_id: str, step: str | None, item: int | None) -> bool:
    """Say whether nothing more can come: the steps are over, or the run is."""
    from mlops_ray.orchestration.ownership import is_gone

    run = ledger.run(run_id)
    if run is None or run.status != "running" or is_gone(run.owner):
        return True
    if step is None:
        return False
    if item is not None:
        calls = {call.item: call.status for call in ledger.items(run_id, step)}
        if calls.get(item, "pending") not in _NOT_OVER:
            return True
    mine = [record for record in ledger.steps(run_id) if _belongs(record.name, step)]
    return all(record.status not in _NOT_OVER for record in mine)


def _belongs(name: str, step: str | None) -> bool:
    """Say whether a step is the one that was asked for, or is nested in it; None asks for all."""
    return step is None or name == step or name.startswith(f"{step}/")


class _Tail:
    """Reads the whole lines that were added to a file since it was last asked.

    A line that is not complete yet waits for its end, except at the very last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lines(self, last: bool) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            content = b""
        self._offset += len(content)
        *whole, self._rest = (self._rest + self._decoder.decode(content, last)).split("\n")
        if last and self._rest:
            whole.append(self._rest)
            self._rest = ""
        return [line.removesuffix("\r") for line in whole]
