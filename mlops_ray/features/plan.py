"""The difference between the definitions and the store: what applying them would do, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa

from mlops_ray.config.base import Frozen
from mlops_ray.config.features import DType, Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.applied import AppliedView, describe, read_applied, write_applied
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.definitions import ARROW_TYPES, define
from mlops_ray.features.offline import OfflineStore

Action = Literal["new", "unchanged", "told", "extend", "rebuild", "refuse", "undeclared"]
"""What applying does to a view.

``new``: its table is made and filled. ``told``: only what acts on reading or is told to people
changed, or the definition is one whose rows are stored already. ``extend``: columns are added, null
in older rows. ``rebuild``: all rows are made anew. ``refuse``: it cannot be done. ``undeclared``:
nothing declares it any more; its tables stay.
"""

_LETTERS = 12
_FILLED = ("new", "rebuild")


class ViewChange(Frozen):
    """What applying the definitions does to one view; ``because`` says why, one reason a line."""

    view: str
    action: Action
    because: tuple[str, ...] = ()
    fix: str = ""


class FeaturePlan(Frozen):
    """What applying the definitions does, view by view, those that feed others first."""

    changes: tuple[ViewChange, ...]

    @property
    def rows_due(self) -> bool:
        """Whether rows have to be made."""
        return any(change.action in _FILLED for change in self.changes)

    @property
    def empty(self) -> bool:
        """Whether definitions and store agree."""
        return all(change.action in ("unchanged", "undeclared") for change in self.changes)

    def of(self, view: str) -> ViewChange:
        """Return what happens to a view."""
        return next(change for change in self.changes if change.view == view)

    def enforce(self) -> None:
        """Refuse what cannot be done.

        Raises:
            FeatureStoreError: Names every refused change, with its reason and what to do.
        """
        refused = [change for change in self.changes if change.action == "refuse"]
        if refused:
            raise FeatureStoreError(
                f"{len(refused)} view{'s' if len(refused) > 1 else ''} cannot be changed like this",
                where=", ".join(f"features.views.{change.view}" for change in refused),
                why="\n       ".join(reason for change in refused for reason in change.because),
                fix=refused[0].fix,
            )


def make_plan(features: Features, store: OfflineStore) -> FeaturePlan:
    """Compare the definitions with what was applied to the store."""
    applied = read_applied(store.root)
    changes = [_change(features, name, applied.get(name), store) for name in features.view_order]
    for name in sorted(applied.keys() - features.views.keys()):
        reason = "its tables stay until `features prune`"
        changes.append(ViewChange(view=name, action="undeclared", because=(reason,)))
    return FeaturePlan(changes=tuple(changes))


def record(features: Features, store: OfflineStore) -> None:
    """Record the definitions as applied, those of views that have a table."""
    add_columns(features, store)
    applied = read_applied(store.root)
    for name in features.views:
        if store.version(name) < 0:
            continue
        before, now = applied.get(name), describe(features, name)
        if before is None or before.model_copy(update={"at": now.at}) != now:
            write_applied(store.root, now)


def add_columns(features: Features, store: OfflineStore) -> None:
    """Add declared columns to the tables that lack them, also where no new row would."""
    for name, view in features.views.items():
        stored = store.stored_schema(name)
        generation = code_digest_of(features, name)
        if stored is None or all(column in stored.names for column in view.features):
            continue
        watermark_us = store.watermark(name, generation=generation)
        if watermark_us is not None:
            nothing = define(features, name).schema.empty_table()
            store.append(name, nothing, watermark_us, generation)


def _change(
    features: Features, name: str, before: AppliedView | None, store: OfflineStore
) -> ViewChange:
    now, columns = describe(features, name), features.views[name].features
    stored = store.stored_schema(name)
    moved = before if before is not None and before.digest != now.digest else None
    if stored is None and moved is not None:
        return ViewChange(view=name, action="rebuild", because=tuple(_differences(moved, now)))
    if stored is None:
        return ViewChange(view=name, action="new", because=("it has no table yet",))
    if refused := tuple(_changed_types(stored, columns)):
        fix = f"raise features.views.{name}.version to make all rows anew, or rename the column"
        return ViewChange(view=name, action="refuse", because=refused, fix=fix)
    if store.watermark(name, generation=now.code) is None:
        reason = "other code made its rows"
        if before is not None and before.code != now.code:
            reason = _changed_code(before, now)
        return ViewChange(view=name, action="rebuild", because=(reason,))
    if before is None:
        return ViewChange(view=name, action="told", because=("its definition is not recorded yet",))
    told = tuple(_paths(before.declared, now.declared))
    if moved is not None:
        told = (*told, "its rows are stored already and go on from where they end")
    if any(column not in stored.names for column in columns):
        return ViewChange(view=name, action="extend", because=told)
    return ViewChange(view=name, action="told" if told else "unchanged", because=told)


def _differences(before: AppliedView, now: AppliedView) -> Iterator[str]:
    if isinstance(now.content["origin"], str) and before.content["origin"] != now.content["origin"]:
        yield f"the view it is made from, {now.content['view']['view']}, is made anew"
    for path in _paths(before.content, now.content):
        if not path.startswith("origin: "):
            yield path
    if before.code != now.code:
        yield _changed_code(before, now)


def _changed_code(before: AppliedView, now: AppliedView) -> str:
    source = now.declared.get("source", {})
    functions = [source[name] for name in ("read", "clean") if source.get(name)]
    old, new = (text[:_LETTERS] or "none" for text in (before.code, now.code))
    return f"the code of {' and '.join(functions) or 'its source'} changed: {old} → {new}"


def _changed_types(stored: pa.Schema, columns: dict[str, DType]) -> Iterator[str]:
    for name, dtype in columns.items():
        if name in stored.names and stored.field(name).type != ARROW_TYPES[dtype]:
            yield f"column {name} is stored as {stored.field(name).type}, declared as {dtype}"


def _paths(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield ``path: old → new`` for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            here = f"{path}.{name}" if path else str(name)
            yield from _paths(before.get(name), now.get(name), here)
    elif _plain(before) != _plain(now):
        yield f"{path}: {_shown(before)} → {_shown(now)}"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return str(value)
