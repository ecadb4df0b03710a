"""How the environment of a run differs from the present one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One difference: what, its value then and now. ``matters``: the result may not come out alike."""

    what: str
    then: str
    now: str
    matters: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now"


def environment_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare the provenance of a run with that of the present; return what is not the same.

    Python, packages, the processor's model and the GPUs matter. Packages that came to it do not; nor
    does another lock file where the packages themselves are known to be the same.
    """
    found = list(_of_packages(then.get("packages") or {}, now.get("packages") or {}))
    if then.get("python") != now.get("python"):
        found.insert(0, Change("Python", str(then.get("python")), str(now.get("python"))))
    if then.get("lock_digest") != now.get("lock_digest"):
        old, new = (str(p.get("lock_digest"))[:12] for p in (then, now))
        found.append(Change("lock file", old, new, matters=not then.get("packages")))
    return found + list(_of_machines(then.get("machine") or {}, now.get("machine") or {}))


def _of_packages(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = ({_normal(n): v for n, v in known.items()} for known in (then, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, is_ = (str(known.get(name) or "not installed") for known in (old, new))
            yield Change(name, was, is_, matters=name in old)


def _of_machines(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name, title in (("processor", "processor"), ("cpu", "CPU"), ("gpus", "GPUs")):
        if name in then and then[name] != now.get(name):
            yield Change(title, _text(then[name]), _text(now.get(name)))


def _text(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
