"""Requests at a constant rate, in a process of its own; runs beside changes of what is served.

Started with a port, a path, a file of bodies, requests a second and a token (or nothing). Each line
of stdin is a request: ["start"] begins to send; ["stop"] ends and answers one pair for each request,
the time in s (of ``time.monotonic``) at which it was due and the ms until its answer, or null where it
failed. A request that had to wait for a free connection is counted from when it was due.
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONNECTIONS = 16


class Rate:
    """Sends over connections of its own, each in a thread."""

    def __init__(self, port: int, path: str, bodies: list[bytes], per_s: float, token: str) -> None:
        self._port, self._path, self._bodies, self._per_s = port, path, bodies, per_s
        self._headers = {"content-type": "application/json"}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self._threads: list[threading.Thread] = []
        self._found: list[tuple[float, float | None]] = []
        self._stop = threading.Event()

    def start(self) -> None:
        self._stop.clear()
        self._found = []
        began_s = time.monotonic() + 0.1
        self._threads = [
            threading.Thread(target=self._send, args=(began_s, first))
            for first in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[tuple[float, float | None]]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return sorted(self._found, key=lambda pair: pair[0])

    def _send(self, began_s: float, first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        for number in itertools.count(first, CONNECTIONS):
            due_s = began_s + number / self._per_s
            if self._stop.wait(max(0.0, due_s - time.monotonic())):
                break
            status = self._ask(connection, self._bodies[number % len(self._bodies)])
            taken_ms = (time.monotonic() - due_s) * 1000
            self._found.append((due_s, taken_ms if status == 200 else None))
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: bytes) -> int:
        try:
            connection.request("POST", self._path, body, self._headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return 0
        return answer.status


def main() -> None:
    port, path, bodies, per_s, token = sys.argv[1:]
    lines = Path(bodies).read_bytes().splitlines()
    rate = Rate(int(port), path, lines, float(per_s), token)
    for line in sys.stdin:
        (name,) = json.loads(line)
        answer: Any = getattr(rate, name)()
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
