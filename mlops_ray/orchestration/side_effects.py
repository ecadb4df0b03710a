"""What a step function does to the world, as far as its source tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlops_ray.config.workflow import Mode

_MARKS: dict[str, Mode] = {
    "mlops_ray.orchestration.marks.effect": "effect",
    "mlops_ray.orchestration.marks.ensure": "ensure",
    "mlops_ray.effect": "effect",
    "mlops_ray.ensure": "ensure",
}
_PREFIXES = ("subprocess.", "smtplib.")
_WRITES = frozenset({"post", "put", "patch", "delete"})
_CLIENTS = frozenset({"requests", "httpx"})
_CALLS = frozenset({"os.system", "os.popen", "os.kill"})
_METHODS = frozenset({"sendmail", "send_message", "to_sql", "put_object", "upload_file"})


def declared_mode(decorators: Iterable[str]) -> Mode | None:
    """Return the mode that a function's decorators declare, None where they declare none."""
    return next((_MARKS[name] for name in decorators if name in _MARKS), None)


def evident_effects(calls: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield the calls, with their lines, that evidently change something outside: processes that
    are started, requests that write, mail."""
    for name, line in calls:
        place, _, last = name.rpartition(".")
        writes = last in _WRITES and place in _CLIENTS
        if writes or name in _CALLS or name.startswith(_PREFIXES):
            yield name, line
        elif place == "?" and last in _METHODS:
            yield f".{last}", line
