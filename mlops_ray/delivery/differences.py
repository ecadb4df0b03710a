"""What differs between two values of one kind: tables, JSON, files, model packages, tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlops_ray.metadata.digest import digest_file

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_LINES = 12
_MOST_ROWS = 3
_MOST_LETTERS = 60


def describe(kind: str, then: Any, now: Any) -> list[str]:
    """Return what differs, in at most a dozen lines; [] where nothing can be said.

    Args:
        kind: That of the artifacts.
        then: The value of then, as the store gives it.
        now: The value of now.
    """
    described = {
        "table": _tables,
        "tree": _trees,
        "json": lambda a, b: _values(a, b, ""),
        "tensors": lambda a, b: _arrays(*(v if isinstance(v, dict) else {"": v} for v in (a, b))),
        "list": lambda a, b: _values(list(map(str, a)), list(map(str, b)), ""),
    }
    lines = list(islice(described[kind](then, now), _MOST_LINES + 1)) if kind in described else []
    return [*lines[:_MOST_LINES], "…"] if len(lines) > _MOST_LINES else lines


def _tables(then: pa.Table, now: pa.Table) -> Iterator[str]:
    before, after = _by_name(then), _by_name(now)
    old, new = ({name: str(column.type) for name, column in t.items()} for t in (before, after))
    yield from _values(old, new, "column ")
    if then.num_rows != now.num_rows:
        yield f"{then.num_rows:,} rows then, {now.num_rows:,} now"
    rows = min(then.num_rows, now.num_rows)
    for name in (name for name in before if name in after):
        yield from _columns(name, before[name].slice(0, rows), after[name].slice(0, rows))


def _by_name(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Return the columns by name; the second one of a name is ``name (2)``."""
    counts: Counter[str] = Counter()
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        counts[name] += 1
        found[name if counts[name] == 1 else f"{name} ({counts[name]})"] = column
    return found


def _columns(name: str, then: pa.ChunkedArray, now: pa.ChunkedArray) -> Iterator[str]:
    if then.type != now.type or then.equals(now):
        return
    places = _places(then, now)
    if places:
        yield f"column {name}: {len(places):,} of {len(then):,} rows differ"
    for place in places[:_MOST_ROWS]:
        yield f"  row {place}: {_change(then[place].as_py(), now[place].as_py())}"


def _places(then: pa.ChunkedArray, now: pa.ChunkedArray) -> list[int]:
    """Return the rows in which two columns of one type differ."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_nested(then.type):
        # Arrow compares no lists and structs.
        pairs = zip(then, now, strict=True)
        return [at for at, pair in enumerate(pairs) if len({_text(v.as_py()) for v in pair}) > 1]
    # NaN equals nothing, and null compares to null: both are told apart by hand.
    unequal = pc.fill_null(pc.not_equal(then, now), False)
    if pa.types.is_floating(then.type):
        both = pc.and_(pc.is_nan(then), pc.is_nan(now))
        unequal = pc.and_(unequal, pc.invert(pc.fill_null(both, False)))
    unequal = pc.or_(unequal, pc.not_equal(pc.is_null(then), pc.is_null(now)))
    places: list[int] = pc.indices_nonzero(unequal).to_pylist()
    return places


def _trees(then: Path, now: Path) -> Iterator[str]:
    old, new = (_files(path) for path in (then, now))
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            yield f"{name}: {'only then' if name in old else 'only now'}"
        elif digest_file(old[name]) != digest_file(new[name]):
            yield f"{name}: other bytes"
            yield from (f"  {line}" for line in _file(old[name], new[name]))


def _file(then: Path, now: Path) -> Iterator[str]:
    """Look inside of files that tell what they hold."""
    if then.suffix == ".json":
        yield from _values(json.loads(then.read_bytes()), json.loads(now.read_bytes()), "")
    elif then.suffix == ".safetensors":
        from safetensors.torch import load_file

        yield from _arrays(load_file(then), load_file(now))
    elif then.suffix == ".arrow":
        import pyarrow as pa

        with pa.memory_map(str(then)) as old, pa.memory_map(str(now)) as new:
            yield from _tables(pa.ipc.open_file(old).read_all(), pa.ipc.open_file(new).read_all())


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    return {str(f.relative_to(path)): f for f in path.rglob("*") if f.is_file()}


class _Array(NamedTuple):
    """A tensor: its type and shape, its bytes, and its values as numpy has them."""

    form: str
    bits: Any
    values: Any


def _array(tensor: Any) -> _Array:
    import numpy as np

    form = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if hasattr(tensor, "detach"):
        import torch

        plain = tensor.detach().cpu().contiguous().reshape(-1)
        bits = plain.view(torch.uint8).numpy()
        # numpy has no bfloat16.
        values = (plain.double() if plain.is_floating_point() else plain).numpy()
    else:
        values = np.ascontiguousarray(tensor).reshape(-1)
        bits = values.view(np.uint8)
    return _Array(form, bits, values)


def _exact(values: Any) -> Any:
    """Return values as a type in which their differences are right."""
    import numpy as np

    kinds = {"c": np.complex128, "i": object, "u": object}
    return values.astype(kinds.get(values.dtype.kind, np.float64))


def _arrays(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    import numpy as np

    for name in sorted(then.keys() | now.keys()):
        label = f"{name}: " if name else ""
        if name not in then or name not in now:
            yield f"{label}{'only then' if name in then else 'only now'}"
            continue
        old, new = (_array(arrays[name]) for arrays in (then, now))
        if old.form != new.form:
            yield f"{label}{old.form} then, {new.form} now"
        elif not np.array_equal(old.bits, new.bits):
            # Values that are equal and have other bits count: 0.0 and -0.0.
            size = old.values.size
            differs = (old.bits != new.bits).reshape(size, -1).any(axis=1)
            with np.errstate(invalid="ignore"):
                apart = np.abs(_exact(old.values[differs]) - _exact(new.values[differs]))
            told = f"by at most {float(apart.max()):.3g}"
            yield f"{label}{apart.size:,} of {size:,} values differ, {told}"


def _values(then: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in [*then, *(n for n in now if n not in then)]:
            here = f"{path}{name}" if not path or path.endswith(" ") else f"{path}.{name}"
            if name not in now or name not in then:
                yield f"{here}: {'only then' if name in then else 'only now'}"
            else:
                yield from _values(then[name], now[name], here)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from _values(old, new, f"{path}[{index}]")
    elif _text(then) != _text(now):
        yield f"{path}: {_change(then, now)}" if path else _change(then, now)


def _change(then: Any, now: Any) -> str:
    return f"{_short(_text(then))} then, {_short(_text(now))} now"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
