"""What runs in HAProxy's place: it adapts the configuration that Ray Serve wrote, and becomes HAProxy.

A program of its own, on the standard library alone: ``haproxy.py BINARY CERTIFICATE KEY ARGUMENT…``,
the two files empty where the endpoint speaks plain HTTP. Ray's template has no place for TLS, opens
the pages for operators on every interface, and answers in plain text where no replica can. And Ray
takes seconds to see that HAProxy was killed: until it has started another, a stand-in serves.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

_SIGKILL = 9
_PR_SET_PDEATHSIG = 1

_SYSLOG = "127.0.0.1:514"
_PREFIX = re.compile(r"^\s*acl is_\S+ path (/v1/models/([^/\s]+))$", re.MULTILINE)
_FRONT_END = re.compile(r"^frontend http_frontend\n\s*bind (\S+):(\d+)", re.MULTILINE)
_ADMIN_SOCKET = re.compile(r"^(\s*stats socket )(\S+)", re.MULTILINE)
_FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"

# Serve would watch each request for a client that goes away, at the price of two tasks; the endpoint
# has deadlines instead.
_EACH_REQUEST = "    http-request set-header x-request-disconnect-disabled ?1"

_PAIR = "endpoint.pem"
_LAST = "last.cfg"
_STAND_IN = "stand-in.cfg"
_STAND_IN_PID = "stand-in.pid"
_STAND_IN_MOST_S = 60.0
_LOOK_EVERY_S = 0.2

_ERRORS = {
    502: ("Bad Gateway", "the replica went away while it answered"),
    503: ("Service Unavailable", "no replica can answer now; try again"),
    504: ("Gateway Timeout", "the replica did not answer in time"),
}
_ERROR_PAGE = (
    "HTTP/1.1 {status} {reason}\r\n"
    "Content-Type: application/json\r\n"
    "Content-Length: {length}\r\n"
    "{more}\r\n"
    "{body}"
)


def adapt(path: Path, certificate: str, key: str, *, again: bool) -> None:
    """Rewrite a configuration file, and put what it refers to beside it.

    With ``again`` it follows one that is in use. Without, it is the first of a process of Ray's that
    knows no application yet; where that replaces one that died, the last configuration serves until
    this one has learnt as much.

    Raises:
        ValueError: It is to speak TLS, and has no place for it.
    """
    folder = path.parent
    for status, (reason, message) in _ERRORS.items():
        (folder / f"{status}.http").write_bytes(_error_page(status, reason, message))
    pair = ""
    if certificate:
        pair = str(folder / _PAIR)
        _write_private(Path(pair), Path(certificate).read_bytes(), Path(key).read_bytes())
    last = folder / _LAST
    if again or not last.is_file():
        last.write_text(adapted(path.read_text(), folder, pair))
    path.write_bytes(last.read_bytes())


def adapted(text: str, folder: Path, pair: str = "") -> str:
    """Return a configuration, adapted; to adapt it again changes nothing.

    Args:
        text: As Ray Serve writes it.
        folder: Has the error pages.
        pair: Where given, the file with certificate and key for HTTP and gRPC.

    Raises:
        ValueError: There is a ``pair``, and the front end for HTTP was not found.
    """
    section, lines, encrypted = "", [], False
    for line in text.splitlines():
        words = line.split()
        if words and not line[0].isspace():
            section = words[-1]
        elif words[:1] == ["bind"]:
            line = _bind(section, words, pair)
            encrypted |= section == "http_frontend"
        elif words[:1] == ["errorfile"]:
            line = f"    errorfile {words[1]} {folder / words[1]}.http"
        elif words[:2] == ["stats", "socket"]:
            line = line.replace(" mode 666 ", " mode 600 ")
        elif words[:2] == ["log", _SYSLOG]:
            # A datagram for each request, to where as a rule nobody listens.
            continue
        lines.append(line)
        if words[:1] == ["bind"] and section == "http_frontend" and _EACH_REQUEST not in text:
            lines += [_EACH_REQUEST, *_other_protocol(text)]
    if pair and not encrypted:
        raise ValueError("there is no front end for HTTP that could speak TLS")
    return "\n".join(lines) + "\n"


def _other_protocol(text: str) -> list[str]:
    """Return the rules by which an application below /v1/models/NAME has /v2/models/NAME too."""
    return [
        f"    http-request set-path {prefix}%[path] if "
        f"{{ path_beg /v2/models/{name}/ }} or {{ path /v2/models/{name} }}"
        for prefix, name in _PREFIX.findall(text)
    ]


def _bind(section: str, words: list[str], pair: str) -> str:
    address = words[1]
    if section in ("prometheus", "stats"):
        return f"    bind 127.0.0.1:{address.rpartition(':')[2]}"
    protocols = {"http_frontend": "h2,http/1.1", "grpc_frontend": "h2"}.get(section)
    if pair and protocols:
        return f"    bind {address} ssl crt {pair} alpn {protocols} ssl-min-ver TLSv1.2"
    return "    " + " ".join(words)


def _error_page(status: int, reason: str, message: str) -> bytes:
    body = f'{{"error":{{"message":"{message}","field":null,"row":null}}}}'
    more = "Retry-After: 1\r\n" if status == 503 else ""
    page = _ERROR_PAGE.format(status=status, reason=reason, length=len(body), more=more, body=body)
    return page.encode()


def _write_private(path: Path, *parts: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"\n".join(parts))


def main(arguments: list[str]) -> None:
    """Adapt the configuration that the arguments name with ``-f``, and become HAProxy."""
    # HAProxy is the child of a Ray worker and would outlive one that is killed, holding the port.
    # Now the kernel kills it together with its parent; that survives exec.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    binary, certificate, key, *rest = arguments
    if "-f" in rest:
        path = Path(rest[rest.index("-f") + 1])
        adapt(path, certificate, key, again="-sf" in rest)
        _guard(binary, path)
        rest += _relieve(path.parent, rest)
    os.execv(binary, [binary, *rest])


def _relieve(folder: Path, arguments: list[str]) -> list[str]:
    """Return the arguments by which HAProxy takes over from a stand-in, where one serves."""
    try:
        pid = (folder / _STAND_IN_PID).read_text()
    except FileNotFoundError:
        return []
    return [pid] if "-sf" in arguments else ["-sf", pid]


def _guard(binary: str, path: Path) -> None:
    """Start a process that stands in for this one, which is to become HAProxy, where it dies."""
    guarded = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.close(guarded)
        os.waitpid(child, 0)
        return
    # Its parent ends at once: Ray ends the processes that it finds below a worker's.
    os.setsid()
    if os.fork() == 0:
        try:
            _watch(guarded, binary, path)
        finally:
            os._exit(0)
    os._exit(0)


def _watch(guarded: int, binary: str, path: Path) -> None:
    select.select([guarded], [], [])
    found = _FRONT_END.search(path.read_text())
    if found is None or _listens(*found.groups()) or not _serve_runs():
        return
    folder = path.parent
    socket_path = str(folder / "stand-in.sock")
    text = _ADMIN_SOCKET.sub(rf"\g<1>{socket_path}", (folder / _LAST).read_text())
    (folder / _STAND_IN).write_text(text)
    process = subprocess.Popen([binary, "-db", "-dR", "-f", str(folder / _STAND_IN)])
    record = folder / _STAND_IN_PID
    record.write_text(str(process.pid))
    end_s = time.monotonic() + _STAND_IN_MOST_S
    while process.poll() is None and time.monotonic() < end_s and _serve_runs():
        time.sleep(_LOOK_EVERY_S)
    record.unlink(missing_ok=True)
    process.kill()


def _serve_runs() -> bool:
    """Say whether Serve's own proxy, which HAProxy falls back on, is there; it ends with Serve."""
    return _listens("127.0.0.1", os.environ.get(_FALLBACK_PORT, "0"))


def _listens(host: str, port: str) -> bool:
    address = "127.0.0.1" if host in ("*", "0.0.0.0", "") else host.strip("[]")
    try:
        socket.create_connection((address, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
