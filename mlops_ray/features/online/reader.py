"""Packed rows as arrays: what a read of an online store returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import NO_TIME
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.matrix import FeatureMatrix
from mlops_ray.features.online.failures import Fallback
from mlops_ray.features.online.layout import FLOAT, HEAD, WORD, Layout, StoredView, convert
from mlops_ray.features.online.protocol import EXPIRED, NOT_FOUND, NULL, PRESENT, Keys

Values = list[bytes | None]
"""The packed row of each key of a view, None where there is none."""

_LENGTH_BIT = 32
_OFFSET = (1 << _LENGTH_BIT) - 1


@dataclass(slots=True)
class Reads:
    """What a reader has met of a view: rows read, not there, and older than the view's TTL.

    ``age_s`` is the age of a row when it was last read, at the moment that was asked for.
    """

    rows: int = 0
    missing: int = 0
    expired: int = 0
    age_s: float | None = None


@dataclass
class _Decoded:
    """Rows of all views side by side.

    ``words`` is [n, w], ``null`` and ``status`` are [n, features]; ``values`` are the rows by view.
    """

    words: NDArray[np.int64]
    status: NDArray[np.uint8]
    values: list[list[bytes]]


class Reader:
    """Reads a fixed list of views.

    A request is a few rows, so time goes by the number of calls: one row is decoded by Python's
    ``struct``, several by numpy with as many calls for ten views as for one.

    Args:
        views: What is read, in order.
        fetch: Returns the values of each view, given the keys of each.
        layout_of: Returns the layout that a value of another than its view's begins with; None where
            such a value counts as missing.
        fallback: Says what is done when the store cannot be reached.

    Raises:
        FeatureStoreError: There is no view.
    """

    def __init__(
        self,
        views: Sequence[StoredView],
        fetch: Callable[[Sequence[Keys]], list[Values]],
        layout_of: Callable[[StoredView, bytes], Layout | None],
        fallback: Fallback,
    ) -> None:
        if not views:
            raise FeatureStoreError("a reader needs a view to read")
        self._views = views
        self._fetch = fetch
        self._layout_of = layout_of
        self._fallback = fallback
        self._counted = [Reads() for _ in views]
        self._other_layouts: dict[bytes, Layout] = {}
        layouts = [view.layout for view in views]
        self._blanks = [layout.blank for layout in layouts]
        starts = np.cumsum([0, *(layout.words for layout in layouts)])
        self._words = int(starts[-1])
        starts = starts[:-1]
        self._schema, self._event, self._created = starts, starts + 1, starts + 2
        self._schemas = np.frombuffer(b"".join(layout.schema for layout in layouts), WORD)
        self._ttl_us = np.array([view.ttl_us for view in views])
        counts = [len(layout.columns) for layout in layouts]
        null_words = np.array([layout.null_words for layout in layouts])
        self._nulls = _ranges(starts + HEAD, null_words)
        self._bits = _ranges(64 * (np.cumsum(null_words) - null_words), counts)
        self._places = _ranges(starts + HEAD + null_words, counts)
        self._owner = np.repeat(np.arange(len(views)), counts)
        dtypes = [dtype for layout in layouts for _, dtype in layout.columns]
        self._names = [f"{view.name}__{name}" for view in views for name, _ in view.layout.columns]
        self._dtypes = dtypes
        self._numeric = np.array(
            [at for at, dtype in enumerate(dtypes) if dtype in ("float", "int", "bool")], np.intp
        )
        self._numeric_names = tuple(self._names[at] for at in self._numeric)
        self._all_numeric = len(self._numeric) == len(dtypes)
        self._whole = np.flatnonzero([dtypes[at] == "int" for at in self._numeric])
        self._numeric_words = self._places[self._numeric]
        self._single = [
            _SingleRow(view, reads) for view, reads in zip(views, self._counted, strict=True)
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The features, ``<view>__<feature>``, in order."""
        return tuple(self._names)

    @property
    def degraded(self) -> str:
        """What this thread's last read did without the store: ``missing``, ``stale``, or nothing."""
        return self._fallback.degraded

    @property
    def is_gone(self) -> bool:
        """Whether the store did not answer when it was last asked: to ask again may take long."""
        return self._fallback.is_gone

    @property
    def reads(self) -> dict[str, Reads]:
        """What was read so far, by view. Readers in several threads may count a little less."""
        return {view.name: reads for view, reads in zip(self._views, self._counted, strict=True)}

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """The features that ``read`` and ``read_values`` return, in order: float, int and bool."""
        return self._numeric_names

    def read_values(self, keys: Sequence[Keys], at_us: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the numeric features [n, f] of all views as of ``at_us``; NaN but where PRESENT.

        Args:
            keys: The key columns of each view.
            at_us: int64 [n], µs since 1970.
        """
        return self.read(keys, at_us)[0]

    def read(
        self, keys: Sequence[Keys], at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return the numeric features, float64 [n, f], as of ``at_us``, and uint8 statuses [n, f].

        PRESENT: the value. NULL: the newest row has a null there. EXPIRED: the newest row is older
        than the view's TTL at that moment. NOT_FOUND: there is no row; or the newest one lies after
        that moment, by event time or created time (the store keeps no older one); or a key is null.
        All but PRESENT are NaN in the matrix. bools are 0 and 1; an int beyond 2^53 is rounded.
        """
        found = self._fetch(keys)
        if len(at_us) == 1:
            return self._single_row(found, int(at_us[0]))
        words, _ = self._words_of(found)
        status = self._status(words, at_us)
        if not self._all_numeric:
            status = status.take(self._numeric, 1)
        matrix = self._matrix(words)
        if status.any():
            matrix[status != PRESENT] = np.nan
        return matrix, status

    def read_columns(self, keys: Sequence[Keys], at_us: NDArray[np.int64]) -> FeatureMatrix:
        """Return every feature as of ``at_us`` by its name ``<view>__<feature>``, numeric ones first.

        Arrays [n]: float64 with NaN for float, int and bool, as in ``read``; objects (str, None)
        for strings; ``datetime64[us]`` with NaT for timestamps.
        """
        if self._all_numeric:
            return FeatureMatrix(self._numeric_names, self.read(keys, at_us)[0], {})
        decoded = self._decode(self._fetch(keys), at_us)
        matrix = self._matrix(decoded.words)
        matrix[decoded.status[:, self._numeric] != PRESENT] = np.nan
        others: dict[str, NDArray[Any]] = {}
        for at, (name, dtype) in enumerate(zip(self._names, self._dtypes, strict=True)):
            if dtype == "string":
                others[name] = np.array(self._texts(decoded, at), object)
            elif dtype == "timestamp":
                instants = decoded.words[:, self._places[at]].copy()
                instants[decoded.status[:, at] != PRESENT] = NO_TIME
                others[name] = instants.view("datetime64[us]")
        return FeatureMatrix(self._numeric_names, matrix, others)

    def read_table(
        self, keys: Sequence[Keys], at_us: NDArray[np.int64]
    ) -> tuple[pa.Table, NDArray[np.uint8]]:
        """Return all features exactly as they were written, and the status of each [n, f].

        The table's columns are called ``<view>__<feature>`` and have the types of the views' schemas;
        what is not PRESENT is null there.
        """
        decoded = self._decode(self._fetch(keys), at_us)
        columns = [self._arrow(decoded, at) for at in range(len(self._names))]
        return pa.table(columns, names=self._names), decoded.status

    def _converted(self, view: StoredView, value: bytes) -> bytes | None:
        if value.startswith(view.layout.schema):
            return value
        schema = value[: WORD.itemsize]
        layout = self._other_layouts.get(schema) or self._layout_of(view, schema)
        if layout is None:
            return None
        # A layout never changes, and a view has few of them.
        self._other_layouts[schema] = layout
        return convert(value, layout, view.layout)

    def _words_of(self, found: list[Values]) -> tuple[NDArray[np.int64], list[Values]]:
        """Return the rows [n, words] of all views side by side, and the values that they are of."""
        words = self._join(found)
        # A value of another layout gives another sum of sizes, or another id where an id is due.
        if words is None or (words.take(self._schema, 1) != self._schemas).any():
            found = [
                [v and self._converted(view, v) for v in values]
                for view, values in zip(self._views, found, strict=True)
            ]
            words = self._join(found)
            assert words is not None
        return words, found

    def _join(self, found: list[Values]) -> NDArray[np.int64] | None:
        whole = [
            [v or blank for v in values] for values, blank in zip(found, self._blanks, strict=True)
        ]
        for at, view in enumerate(self._views):
            if view.layout.has_strings:
                whole[at] = [value[: view.layout.size] for value in whole[at]]
        rows = whole[0] if len(whole) == 1 else chain.from_iterable(zip(*whole, strict=True))
        content = b"".join(rows)
        if len(content) != len(found[0]) * self._words * WORD.itemsize:
            return None
        return np.frombuffer(content, WORD).reshape(-1, self._words)

    def _matrix(self, words: NDArray[np.int64]) -> NDArray[np.float64]:
        matrix = words.view(FLOAT).take(self._numeric_words, 1)
        if len(self._whole):
            matrix[:, self._whole] = words.take(self._numeric_words[self._whole], 1)
        return matrix

    def _judge(
        self, words: NDArray[np.int64], at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
        """Return which rows [n, views] are too old, and which lie after their moment; None: none."""
        at = at_us[:, None]
        event = words.take(self._event, 1)
        age = at - event
        after = np.maximum(event, words.take(self._created, 1)) > at
        old = age > self._ttl_us
        if not len(age) or not (after | old).any():
            for reads, age_us in zip(self._counted, age[:1].ravel().tolist(), strict=False):
                reads.rows += len(age)
                reads.age_s = age_us / 1e6
            return None
        old &= ~after
        self._count(old, after, age)
        return old, after

    def _count(
        self, old: NDArray[np.bool_], after: NDArray[np.bool_], age: NDArray[np.int64]
    ) -> None:
        expired, missing = old.sum(0).tolist(), after.sum(0).tolist()
        first = after.argmin(0).tolist()
        for place, reads in enumerate(self._counted):
            reads.rows += len(age)
            reads.expired += expired[place]
            reads.missing += missing[place]
            if not after[first[place], place]:
                reads.age_s = int(age[first[place], place]) / 1e6

    def _status(self, words: NDArray[np.int64], at_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        judged = self._judge(words, at_us)
        null_words = words.take(self._nulls, 1)
        if null_words.any():
            bits = np.unpackbits(null_words.view(np.uint8), axis=1, bitorder="little")
            status = bits.take(self._bits, 1)
        else:
            status = np.zeros((len(words), len(self._bits)), np.uint8)
        if judged is not None:
            old, after = judged
            status[old[:, self._owner]] = EXPIRED
            status[after[:, self._owner]] = NOT_FOUND
        return status

    def _decode(self, found: list[Values], at_us: NDArray[np.int64]) -> _Decoded:
        words, found = self._words_of(found)
        values = [[v or b"" for v in column] for column in found]
        return _Decoded(words, self._status(words, at_us), values)

    def _texts(self, decoded: _Decoded, at: int) -> list[str | None]:
        view = int(self._owner[at])
        size = self._views[view].layout.size
        texts: list[str | None] = []
        for value, word, status in zip(
            decoded.values[view],
            decoded.words[:, self._places[at]].tolist(),
            decoded.status[:, at].tolist(),
            strict=True,
        ):
            begin = size + (word & _OFFSET)
            text = value[begin : begin + (word >> _LENGTH_BIT)]
            texts.append(text.decode() if status == PRESENT else None)
        return texts

    def _arrow(self, decoded: _Decoded, at: int) -> pa.Array:
        dtype, absent = self._dtypes[at], decoded.status[:, at] != PRESENT
        if dtype == "string":
            return pa.array(self._texts(decoded, at), pa.string())
        words = np.ascontiguousarray(decoded.words[:, self._places[at]])
        if dtype == "float":
            return pa.array(words.view(FLOAT), mask=absent, from_pandas=False)
        if dtype == "bool":
            return pa.array(words.view(FLOAT) == 1, mask=absent)
        return pa.array(words, mask=absent).cast(ARROW_TYPES[dtype])

    def _single_row(
        self, found: list[Values], at_us: int
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        numbers: list[float] = []
        statuses = bytearray()
        for single, view, (value,) in zip(self._single, self._views, found, strict=True):
            if value is not None and not value.startswith(view.layout.schema):
                value = self._converted(view, value)
            single.decode(value, at_us, numbers, statuses)
        return np.array([numbers], np.float64), np.frombuffer(statuses, np.uint8)[None]


class _SingleRow:
    """Decodes one row of a view, its numeric features only."""

    def __init__(self, view: StoredView, reads: Reads) -> None:
        layout = view.layout
        self._reads = reads
        self._ttl_us = view.ttl_us
        self._unpack = layout.unpack
        self._first = layout.first
        self._places = [
            place for place, (_, dtype) in enumerate(layout.columns)
            if dtype in ("float", "int", "bool")
        ]  # fmt: skip
        self._all = len(self._places) == len(layout.columns)
        self._blank = [np.nan] * len(self._places)
        self._bytes = {s: bytes([s]) * len(self._places) for s in (PRESENT, NOT_FOUND, EXPIRED)}

    def decode(
        self, value: bytes | None, at_us: int, numbers: list[float], statuses: bytearray
    ) -> None:
        """Append the row's numbers and their statuses as of ``at_us``."""
        row = None if value is None else self._unpack(value)
        reads = self._reads
        reads.rows += 1
        if row is None or row[1] > at_us or row[2] > at_us:
            reads.missing += 1
            numbers += self._blank
            statuses += self._bytes[NOT_FOUND]
            return
        age_us = at_us - row[1]
        reads.age_s = age_us / 1e6
        if age_us > self._ttl_us:
            reads.expired += 1
            numbers += self._blank
            statuses += self._bytes[EXPIRED]
        elif any(row[HEAD : self._first]):
            self._decode_nulls(row, numbers, statuses)
        else:
            words = row[self._first :]
            numbers += words if self._all else [words[place] for place in self._places]
            statuses += self._bytes[PRESENT]

    def _decode_nulls(self, row: Any, numbers: list[float], statuses: bytearray) -> None:
        for place in self._places:
            null = row[HEAD + place // 64] >> place % 64 & 1
            numbers.append(np.nan if null else row[self._first + place])
            statuses.append(NULL if null else PRESENT)


def _ranges(starts: Any, lengths: Any) -> NDArray[np.int64]:
    """Return all of start, start + 1, … for each start and its length."""
    parts = [np.arange(s, s + n, dtype=np.int64) for s, n in zip(starts, lengths, strict=True)]
    return np.concatenate(parts)
