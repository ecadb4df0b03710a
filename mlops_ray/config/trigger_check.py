"""What the schema cannot see of triggers: names of other sections, and rings of triggers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from mlops_ray.config.compose import Composed
from mlops_ray.config.project import Project
from mlops_ray.errors import Problem


def trigger_problems(project: Project, composed: Composed) -> Iterator[Problem]:
    """Yield unknown workflows and views, and triggers that would start each other for ever."""
    for name, trigger in project.triggers.items():
        path = f"triggers.{name}"
        known = composed.workflows
        yield from _unknown(f"{path}.workflow", "workflow", trigger.workflow, known, composed)
        if trigger.data is not None:
            views = project.features.views
            yield from _unknown(f"{path}.data", "feature view", trigger.data, views, composed)
        if trigger.after is not None:
            named = trigger.after.workflow
            yield from _unknown(f"{path}.after.workflow", "workflow", named, known, composed)
            yield from _misnamed(f"{path}.after.workflow", named, composed)
    ring = _ring(project, "succeeded") or _ring(project, "failed")
    if ring:
        path = f"triggers.{ring[0]}"
        what = f"{' → '.join([*ring, ring[0]])} would start each other for ever."
        yield Problem(path, what, *composed.origin(path), "A failed job is tried again by retries.")


def _unknown(
    path: str, kind: str, name: str, known: Iterable[str], composed: Composed
) -> Iterator[Problem]:
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}."
        yield Problem(path, f"there is no {kind} {name!r}.", *composed.origin(path), hint)


def _misnamed(path: str, option: str, composed: Composed) -> Iterator[Problem]:
    """Runs go by the name that the workflow gives itself."""
    name = composed.workflow_names.get(option, option)
    if name != option:
        what = f"workflow/{option}.yaml says name: {name}, so no run of {option!r} would be seen."
        yield Problem(path, what, *composed.origin(path), "Let file and name be the same.")


def _ring(project: Project, status: str) -> list[str]:
    """Return triggers each of which is fired by the end of the one before; [] without a ring.

    ``status`` is how all of them end: where some have to fail and others to succeed it is a repair.
    """
    follows = {
        name: [
            other
            for other, later in project.triggers.items()
            if later.after is not None
            and later.after.workflow == trigger.workflow
            and later.after.status in (status, "any")
        ]
        for name, trigger in project.triggers.items()
    }
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((ring for other in follows[name] if (ring := walk(other, [*path, name]))), [])

    return next((ring for name in follows if (ring := walk(name, []))), [])
