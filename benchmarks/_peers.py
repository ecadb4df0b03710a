"""Peers, each in a virtual environment of its own, made from its locked requirements."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).parent.parent
REQUIREMENTS = Path(__file__).parent / "peers"


def python(peer: str) -> Path:
    """Return the interpreter of a peer's environment; it is made when its requirements changed."""
    requirements = REQUIREMENTS / f"{peer}.txt"
    folder = ROOT / ".peers" / peer
    interpreter = folder / "bin" / "python"
    mark = folder / "requirements.digest"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if mark.is_file() and mark.read_text() == digest:
        return interpreter
    print(f"making the environment of {peer} in {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", str(requirements)], check=True)
    mark.write_text(digest)
    return interpreter


class Worker:
    """A peer's process that answers one JSON line to each.

    Args:
        peer: Whose environment; None is this one, with the benchmarks on its path.
        script: A file of this folder; it reads lines from stdin and prints its answers.
        arguments: What it is started with.
        log: Where what it says on stderr goes; None is this process's own.
        environment: Variables beside those of this process.
    """

    def __init__(
        self,
        peer: str | None,
        script: str,
        *arguments: str,
        log: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        interpreter = sys.executable if peer is None else str(python(peer))
        command = [interpreter, str(Path(__file__).parent / script), *arguments]
        variables = os.environ | ({"PYTHONPATH": str(ROOT)} if peer is None else {})
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables | dict(environment or {}),
        )

    def __call__(self, *request: Any) -> Any:
        """Send a request; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            # A peer may print what it likes; answers are marked.
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"the peer's process ended with {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
