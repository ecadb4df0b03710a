"""Load for the serving benchmark: wrk in a process of its own, and what the server's processes use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Requests are formatted before the load starts: then wrk takes little of the machine from the server.
_SCRIPT = """
local requests, place = {}, 0
function init(args)
  wrk.headers["content-type"] = "application/json"
  if args[3] then wrk.headers["authorization"] = "Bearer " .. args[3] end
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", args[2], nil, line)
  end
end
function request()
  place = place % #requests + 1
  return requests[place]
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\nfound {"requests": %d, "us": %d, "p50": %f, "p99": %f, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""

_MARK = "SERVING_BENCHMARK"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Target:
    """Where requests go: a port and a path of this machine, and whose processes answer there."""

    name: str
    port: int
    path: str
    bodies: str
    server: str
    token: str = ""


@dataclass(frozen=True)
class Found:
    """What one load of a server showed."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def program() -> str:
    found = shutil.which("wrk")
    if found is None:
        raise RuntimeError("wrk is not installed: run setup/servers.sh")
    return found


def write_script(folder: Path) -> Path:
    script = folder / "load.lua"
    script.write_text(_SCRIPT)
    return script


def load(target: Target, script: Path, bodies: Path, connections: int, duration_s: int) -> Found:
    """Send requests for a while over so many connections. RuntimeError if one of them failed."""
    line = [program(), "-t1", f"-c{connections}", f"-d{duration_s}s", "--timeout", "10s"]
    line += ["-s", str(script), f"http://127.0.0.1:{target.port}", "--"]
    line += [str(bodies), target.path, *([target.token] if target.token else [])]
    before = cpu_s(target.server)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    used_s = cpu_s(target.server) - before
    answers = [text for text in done.stdout.splitlines() if text.startswith("found ")]
    if done.returncode or not answers:
        raise RuntimeError(f"wrk failed on {target.name}: {done.stdout}{done.stderr}")
    found = json.loads(answers[-1].removeprefix("found "))
    if found["failed"] or not found["requests"]:
        raise RuntimeError(f"{target.name} failed {found['failed']} of {found['requests']}")
    return Found(
        per_s=found["requests"] / found["us"] * 1e6,
        p50_ms=found["p50"] / 1000,
        p99_ms=found["p99"] / 1000,
        cpu_us=used_s / found["requests"] * 1e6,
    )


def cpu_s(server: str) -> float:
    """Return the processor time that the processes of a server have used until now."""
    total = 0
    for process in processes(server):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def mark(server: str) -> dict[str, str]:
    """Return what a server's first process needs in its environment, to be found by."""
    return {_MARK: f"{os.getpid()}-{server}"}


def processes(server: str) -> list[int]:
    """Return the ids of a server's processes: all that came from the first one, orphans too."""
    wanted = f"{_MARK}={os.getpid()}-{server}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if wanted in variables:
                found.append(int(entry))
    return found
