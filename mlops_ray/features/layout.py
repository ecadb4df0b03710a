"""How a feature row lies in the online store: one packed binary value for each (view, entity key).

Little-endian words of eight bytes: schema id, event time, created time (µs since 1970), null bits
(one word for each 64 features), then the features as float64, NaN where null. The schema id stands
for the view's definition: a row written under another one is not read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.definitions import define
from mlops_ray.features.keys import encode_key

HEAD = 3
WORD = np.dtype("<i8")
FLOAT = np.dtype("<f8")
NEVER = np.iinfo(np.int64).max

_TIMES = struct.Struct("<qq")


@dataclass(frozen=True)
class Layout:
    """How the values of one view are laid out."""

    prefix: bytes
    schema: bytes
    features: int
    null_words: int
    ttl_us: int
    blank: bytes

    @property
    def words(self) -> int:
        """The length of a row."""
        return HEAD + self.null_words + self.features


def layout_of(features: Features, name: str) -> Layout:
    """Return the layout of a view's rows."""
    definition = define(features, name)
    count = len(definition.feature_names)
    null_words = (count + 63) // 64
    schema = bytes.fromhex(definition.digest[:16])
    blank = np.zeros(HEAD + null_words + count, WORD)
    blank[1:HEAD] = NEVER
    blank[HEAD + null_words :].view(FLOAT)[:] = np.nan
    prefix = encode_key(b"v", [name])
    assert prefix is not None
    ttl_us = NEVER if definition.ttl_us is None else definition.ttl_us
    return Layout(prefix, schema, count, null_words, ttl_us, blank.tobytes())


def pack(
    layout: Layout,
    event_us: NDArray[np.int64],
    created_us: NDArray[np.int64],
    values: NDArray[np.float64],
    null: NDArray[np.bool_] | None,
) -> bytes:
    """Return the packed rows, one behind the other; ``values`` and ``null`` are [n, f]."""
    rows = len(event_us)
    if values.shape != (rows, layout.features):
        raise FeatureStoreError(
            f"{rows} rows of {layout.features} features are due, the matrix is {values.shape}"
        )
    words = np.zeros((rows, layout.words), WORD)
    words[:, 0] = np.frombuffer(layout.schema, WORD)
    words[:, 1] = event_us
    words[:, 2] = created_us
    if null is not None:
        bits = np.zeros((rows, layout.null_words * 64), np.bool_)
        bits[:, : layout.features] = null
        packed = np.packbits(bits, axis=1, bitorder="little")
        words[:, HEAD : HEAD + layout.null_words] = packed.view(WORD)
        values = np.where(null, np.nan, values)
    words[:, HEAD + layout.null_words :].view(FLOAT)[:] = values
    return words.tobytes()


def stored_times(stored: bytes) -> tuple[int, ...]:
    """Return event time and created time of a packed row."""
    return _TIMES.unpack_from(stored, 8)
