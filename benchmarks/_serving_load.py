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

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Target:
    """Where requests go: a server on this machine, by its port, its path and its first process."""

    name: str
    port: int
    path: str
    bodies: str
    pid: int
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
    before = cpu_s(target.pid)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    used_s = cpu_s(target.pid) - before
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


def cpu_s(pid: int) -> float:
    """Return the processor time that a process and all that came from it have used."""
    total = 0
    for process in tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found
