"""Ctrl-C on a real run, then the same command: it goes on from the finished step."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlops_ray.cli.init import write_project
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger

NAME = "slow_orders"
PATIENCE_S = 120.0
STEPS = '''
"""Steps that leave marks; the second waits for permission to end."""

import time
from pathlib import Path


def first(marks: str) -> int:
    mark(marks, "first")
    return 1


def second(marks: str, first: int) -> int:
    mark(marks, "waiting")
    while not (Path(marks) / "permission").exists():
        time.sleep(0.05)
    mark(marks, "second")
    return first + 1


def mark(folder: str, name: str) -> None:
    with (Path(folder) / name).open("a") as file:
        file.write("x")
'''
WORKFLOW = f"""\
name: slow
steps:
  first: {{uses: {NAME}.steps.first, with: {{marks: MARKS}}}}
  second: {{uses: {NAME}.steps.second, with: {{marks: MARKS, first: $first}}}}
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A temporary folder of Ray's with a path short enough for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_project(tmp_path / "project", NAME, NAME)
    (tmp_path / "marks").mkdir()
    workflow = tmp_path / "project/configs/workflow"
    workflow.mkdir()
    (workflow / "slow.yaml").write_text(WORKFLOW.replace("MARKS", str(tmp_path / "marks")))
    (tmp_path / f"project/{NAME}/steps.py").write_text(STEPS)
    return tmp_path / "project"


def start(project: Path, ray_folder: Path) -> subprocess.Popen[str]:
    """Start the run in a session of its own, on a Ray of its own beside any other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MLOPS_RAY_HOME", "RAY_ADDRESS")
    }
    environment |= {
        "RAY_TMPDIR": str(ray_folder),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    arguments = ["cluster.address=local", f"cluster.dashboard_port={port}", "cluster.num_cpus=2"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlops_ray", "run", "workflow=slow", *arguments],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def session_members(session: int) -> dict[int, str]:
    """Return the processes of a session, and their names, that still live."""
    members = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, _parent, _group, member_of, *_ = rest.split()
        if int(member_of) == session and state != "Z":
            members[int(folder.name)] = name
    return members


def end(process: subprocess.Popen[str]) -> None:
    for member in session_members(process.pid):
        os.kill(member, signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_an_interrupted_run_goes_on_from_the_finished_step(
    project: Path, ray_folder: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    process = start(project, ray_folder)
    try:
        wait_for(lambda: (marks / "waiting").exists() or process.poll() is not None, "step second")
        assert process.poll() is None, process.communicate()[0]
        assert len(session_members(process.pid)) > 1
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
        wait_for(lambda: not session_members(process.pid), "Ray's processes to end")
    finally:
        end(process)
    assert process.returncode == 130, output
    assert "interrupted; the same command goes on from the finished steps" in output
    assert "Traceback" not in output
    ledger = Ledger(Home(project / ".mlops-ray").ledger_url)
    (record,) = ledger.runs()
    assert record.status == "interrupted"
    assert [step.status for step in ledger.steps(record.run_id)] == ["succeeded", "pending"]

    (marks / "permission").touch()
    process = start(project, ray_folder)
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
        wait_for(lambda: not session_members(process.pid), "Ray's processes to end")
    finally:
        end(process)
    assert process.returncode == 0, output
    (resumed,) = ledger.runs()
    assert (resumed.run_id, resumed.status) == (record.run_id, "succeeded")
    counts = {path.name: len(path.read_text()) for path in marks.iterdir()}
    assert counts == {"first": 1, "waiting": 2, "second": 1, "permission": 0}
