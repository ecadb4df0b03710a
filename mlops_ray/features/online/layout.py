"""How a feature row lies in an online store: one packed binary value for each entity of a view.

Little-endian words of eight bytes: schema id, event time, created time (µs since 1970), null bits
(one word for each 64 features), then a word for each feature; behind them the UTF-8 bytes of its
strings. A float or bool is a float64, an int or timestamp an int64, a string its offset among
those bytes and, in the upper half, its length. A null is NaN, the smallest int64 for a timestamp, 0
for the others.

The schema id stands for the names and types of the features, in order. A store keeps what each id
stands for, so rows that were written before a column was added can be read.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import DType, Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import NO_TIME
from mlops_ray.features.definitions import define
from mlops_ray.features.online.encoding import cut

HEAD = 3
WORD = np.dtype("<i8")
FLOAT = np.dtype("<f8")
NEVER = np.iinfo(np.int64).max

_NAN = int(np.array(np.nan, FLOAT).view(WORD))
_BLANKS: dict[DType, int] = {
    "float": _NAN, "bool": _NAN, "timestamp": NO_TIME, "int": 0, "string": 0,
}  # fmt: skip
_CODES: dict[DType, str] = {"float": "d", "bool": "d", "timestamp": "q", "int": "q", "string": "q"}


@dataclass(frozen=True)
class Layout:
    """Where each feature of a row lies; ``columns`` are their names and types."""

    columns: tuple[tuple[str, DType], ...]

    @cached_property
    def schema(self) -> bytes:
        """The eight bytes that rows of this layout begin with."""
        return hashlib.blake2b(self.to_json(), digest_size=8).digest()

    @property
    def null_words(self) -> int:
        """How many words the null bits take."""
        return (len(self.columns) + 63) // 64

    @property
    def first(self) -> int:
        """The word of the first feature."""
        return HEAD + self.null_words

    @property
    def words(self) -> int:
        """The number of words before the strings."""
        return self.first + len(self.columns)

    @cached_property
    def size(self) -> int:
        """The number of bytes before the strings."""
        return self.words * WORD.itemsize

    @cached_property
    def unpack(self) -> Any:
        """Turns a row into its words: schema, times, null bits, features."""
        codes = "".join(_CODES[dtype] for _, dtype in self.columns)
        return struct.Struct(f"<8sqq{self.null_words}Q{codes}").unpack_from

    @cached_property
    def has_strings(self) -> bool:
        """Whether rows have a tail."""
        return any(dtype == "string" for _, dtype in self.columns)

    @cached_property
    def blank(self) -> bytes:
        """A row that lies after every moment, all null."""
        words = np.zeros(self.words, WORD)
        words[0] = np.frombuffer(self.schema, WORD)[0]
        words[1:HEAD] = NEVER
        words[HEAD : self.first] = _bits(np.ones((1, len(self.columns)), np.bool_), self)[0]
        words[self.first :] = [_BLANKS[dtype] for _, dtype in self.columns]
        return words.tobytes()

    def to_json(self) -> bytes:
        """Return it as a store keeps it beside the rows."""
        return json.dumps(self.columns).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Layout:
        """Read what ``to_json`` wrote."""
        return cls(tuple((name, dtype) for name, dtype in json.loads(content)))


@dataclass(frozen=True)
class StoredView:
    """What a store has to know of a view.

    ``digest`` is the first eight bytes of the definition's: rows of two definitions lie side by side.
    """

    name: str
    keys: tuple[str, ...]
    schema: pa.Schema
    layout: Layout
    ttl_us: int
    digest: bytes


def stored_view(features: Features, name: str) -> StoredView:
    """Return how a view is stored."""
    definition = define(features, name)
    return StoredView(
        name,
        tuple(definition.keys),
        definition.schema,
        Layout(tuple(definition.features.items())),
        NEVER if definition.ttl_us is None else definition.ttl_us,
        bytes.fromhex(definition.digest[:16]),
    )


def is_left_over(
    views: Mapping[str, StoredView], filled: Set[str], name: str, digest: bytes
) -> bool:
    """Say whether rows may go; ``filled`` are the views whose present definition has its rows."""
    return name not in views or (digest != views[name].digest and name in filled)


def pack(
    layout: Layout, event_us: NDArray[np.int64], created_us: NDArray[np.int64], rows: pa.Table
) -> list[bytes]:
    """Return the packed value of each row; ``rows`` has at least the layout's columns, typed."""
    count = len(event_us)
    words = np.zeros((count, layout.words), WORD)
    words[:, 0] = np.frombuffer(layout.schema, WORD)
    words[:, 1], words[:, 2] = event_us, created_us
    null = np.zeros((count, len(layout.columns)), np.bool_)
    texts: list[pa.Array] = []
    ends = np.zeros(count, np.int64)
    for place, (name, dtype) in enumerate(layout.columns):
        values = _whole(rows[name])
        if values.null_count:
            null[:, place] = values.is_null().to_numpy(zero_copy_only=False)
        if dtype == "string":
            text = pc.fill_null(values, "").cast(pa.large_binary())
            length = np.asarray(pc.binary_length(text), np.int64)
            words[:, layout.first + place] = ends | length << 32
            ends = ends + length
            texts.append(text)
        else:
            words[:, layout.first + place] = _words(values, dtype)
    if null.any():
        words[:, HEAD : layout.first] = _bits(null, layout)
    return _split(words.tobytes(), layout.size, texts)


def _words(values: pa.Array, dtype: DType) -> NDArray[np.int64]:
    if dtype == "bool":
        values = values.cast(pa.float64())
    elif dtype == "int" and values.null_count:
        values = pc.fill_null(values, 0)
    # A null is NaN or NaT in numpy: the words that stand for it.
    return np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).view(WORD)


def _bits(null: NDArray[np.bool_], layout: Layout) -> NDArray[np.int64]:
    padded = np.zeros((len(null), layout.null_words * 64), np.bool_)
    padded[:, : null.shape[1]] = null
    return np.packbits(padded, axis=1, bitorder="little").view(WORD)


def _split(content: bytes, size: int, texts: list[pa.Array]) -> list[bytes]:
    fixed = [content[at : at + size] for at in range(0, len(content), size)]
    if not texts:
        return fixed
    tails = cut(pc.binary_join_element_wise(*texts, pa.scalar(b"", pa.large_binary())))
    return [head + tail for head, tail in zip(fixed, tails, strict=True)]


def _whole(values: pa.ChunkedArray) -> pa.Array:
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()


def convert(value: bytes, old: Layout, new: Layout) -> bytes:
    """Return a row of one layout in another: columns that it does not have are null."""
    words = np.frombuffer(value, WORD, old.words)
    old_null = np.unpackbits(words[HEAD : old.first].view(np.uint8), bitorder="little")
    places = {column: place for place, column in enumerate(old.columns)}
    result = np.frombuffer(new.blank, WORD).copy()
    result[1:HEAD] = words[1:HEAD]
    null = np.ones((1, len(new.columns)), np.bool_)
    for place, column in enumerate(new.columns):
        found = places.get(column)
        if found is not None and not old_null[found]:
            result[new.first + place] = words[old.first + found]
            null[0, place] = False
    result[HEAD : new.first] = _bits(null, new)[0]
    return result.tobytes() + value[old.size :]


def unknown_layout(view: str, where: str) -> FeatureStoreError:
    """Make the error for a row that says of itself what the store does not know."""
    return FeatureStoreError(
        f"a row of view {view!r} has a layout that the store does not know",
        where=where,
        why="something else wrote to the store, or a part of it was removed",
        fix="run the features workflow with `--fresh`: it fills the store again",
    )
