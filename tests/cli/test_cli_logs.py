"""The verb ``logs``: which lines of whom, and following them until it is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import NewEvent, RunRecord, StepChange
from mlops_ray.orchestration.capture import captured, log_path
from mlops_ray.orchestration.ownership import owner_name

RUN = "20260101-000000-abcd"
STEPS = ["load", "prepare/clean", "prepare/split", "fit"]


class World:
    """A home with a run whose steps write their logs when they are told to."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root, Storage())
        self.ledger = Ledger(self.home.ledger_url)
        self.start(RUN, owner_name())

    def start(self, run_id: str, owner: str) -> None:
        record = RunRecord(
            run_id=run_id,
            project="tiny",
            workflow="train",
            status="running",
            config_digest="0",
            started_at=datetime.now(UTC),
            ended_at=None,
            owner=owner,
            config={},
            provenance={},
        )
        self.ledger.start_run(record, STEPS)

    def write(self, step: str, text: str, item: int = -1, run_id: str = RUN) -> None:
        path = log_path(self.home, run_id, step, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode())

    def set(self, step: str, status: str, item: int = -1) -> None:
        change = StepChange(run_id=RUN, name=step, item=item, values={"status": status})
        event = NewEvent(
            project="tiny", kind=f"step_{status}", run_id=RUN, step=step, data={"item": item}
        )
        self.ledger.apply([change, event])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / ".mlops-ray")
    yield made
    made.ledger.close()


def test_one_step_is_shown_as_it_printed(world: World, command: Callable[..., Any]) -> None:
    world.write("fit", "epoch 1\nprogress ▏▎▍\nno end of line")
    world.write("load", "not this")
    done = command("logs", RUN, "fit")
    assert (done.code, done.out) == (0, "epoch 1\nprogress ▏▎▍\nno end of line\n")


def test_several_steps_and_calls_come_in_the_order_of_the_plan(
    world: World, command: Callable[..., Any]
) -> None:
    world.write("fit", "tenth", item=10)
    world.write("fit", "second", item=2)
    world.write("prepare/split", "split")
    world.write("prepare/clean", "clean")
    world.write("load", "load")
    lines = command("logs", "latest").out.splitlines()
    assert lines == [
        "load | load",
        "prepare/clean | clean",
        "prepare/split | split",
        "fit[2] | second",
        "fit[10] | tenth",
    ]
    assert command("logs", RUN, "prepare").out.splitlines() == lines[1:3]
    assert command("logs", RUN, "fit").out.splitlines() == lines[3:]
    assert command("logs", RUN, "fit", "--item", "10").out == "tenth\n"
    as_json = command("logs", RUN, "fit", "--json").out.splitlines()
    assert json.loads(as_json[0]) == {"step": "fit", "item": 2, "line": "second"}


def test_what_does_not_exist_is_said(world: World, command: Callable[..., Any]) -> None:
    unknown = command("logs", "2027")
    assert unknown.code == 1
    assert "no run '2027'" in unknown.err
    misspelt = command("logs", RUN, "fitt")
    assert misspelt.code == 1
    assert "did you mean fit?" in misspelt.err
    world.start("20260101-999999-ffff", "here:1:1")
    assert "2 runs begin with '2026'" in command("logs", "2026").err
    assert command("logs", "20260101-0", "fit").code == 0
    assert command("logs", RUN, "--item", "3").code == 2


def test_events_are_json_lines(world: World, command: Callable[..., Any]) -> None:
    world.set("load", "running")
    world.set("fit", "running", item=4)
    found = [json.loads(line) for line in command("logs", RUN, "--events").out.splitlines()]
    assert [(event["step"], event["kind"]) for event in found] == [
        ("load", "step_running"),
        ("fit", "step_running"),
    ]
    assert len(command("logs", RUN, "fit", "--events", "--item", "4").out.splitlines()) == 1
    assert command("logs", RUN, "fit", "--events", "--item", "5").out == ""


@pytest.fixture
def follow(world: World, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"MLOPS_RAY_HOME": str(world.home.root)}
        line = [sys.executable, "-m", "mlops_ray", "logs", "-f", *arguments]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, cwd=tmp_path, env=environment, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_step_is_followed_until_it_is_over(
    world: World, follow: Callable[..., subprocess.Popen[str]]
) -> None:
    process = follow(RUN, "fit")
    assert process.stdout is not None
    world.set("fit", "running")
    world.write("fit", "one\ntw")
    assert process.stdout.readline() == "one\n"
    # A character that is cut in two by the moment of reading stays whole.
    path = log_path(world.home, RUN, "fit")
    content = "o and a half ½\nlast".encode()
    for byte in content:
        with path.open("ab") as file:
            file.write(bytes([byte]))
        time.sleep(0.02)
    assert process.stdout.readline() == "two and a half ½\n"
    world.set("fit", "succeeded")
    rest, _ = process.communicate(timeout=20)
    assert (rest, process.returncode) == ("last\n", 0)


def test_a_whole_run_and_its_events_are_followed_until_it_is_over(
    world: World, follow: Callable[..., subprocess.Popen[str]]
) -> None:
    output, events = follow(RUN), follow(RUN, "--events")
    world.set("load", "running")
    world.write("load", "reading\n")
    assert output.stdout is not None
    assert output.stdout.readline() == "load | reading\n"
    world.write("fit", "fitted\n", item=1)
    world.ledger.finish_run(RUN, "succeeded")
    assert output.communicate(timeout=20)[0] == "fit[1] | fitted\n"
    kinds = [json.loads(line)["kind"] for line in events.communicate(timeout=20)[0].splitlines()]
    assert kinds == ["step_running"]


def test_following_ends_where_the_driver_is_dead(
    world: World, follow: Callable[..., subprocess.Popen[str]]
) -> None:
    script = "from mlops_ray.orchestration.ownership import owner_name; print(owner_name())"
    dead = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    world.start("20270101-000000-dead", dead.stdout.strip())
    assert follow("20270101-000000-dead").communicate(timeout=20)[0] == ""


_PRINTS = """
import ctypes, logging, os, subprocess, sys
from pathlib import Path
from mlops_ray.orchestration.capture import captured
print("before", flush=True)
with captured(Path(sys.argv[1])):
    print("print")
    sys.stderr.write("stderr\\n")
    logging.warning("logging")
    os.write(1, b"descriptor\\n")
    subprocess.run(["echo", "subprocess"], check=True)
    ctypes.CDLL(None).puts(b"C library")
print("after")
"""


def test_a_step_log_has_what_c_code_and_subprocesses_print(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "fit.log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    line = [sys.executable, "-c", _PRINTS, str(path)]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "before\nafter\n"
    kept = path.read_text().splitlines()
    assert sorted(kept) == sorted(
        ["print", "stderr", "WARNING:root:logging", "descriptor", "subprocess", "C library"]
    )
    silent = tmp_path / "logs" / "silent.log"
    with captured(silent):
        pass
    assert not silent.exists()
