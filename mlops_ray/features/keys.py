"""Hashes of entity keys: typed, and the same in every process.

1 and "1", and ("1", "11") and ("11", "1"), have different hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError

Hashes = NDArray[np.uint64]

_WORD_BYTES = 8
_TEXT, _WHOLE, _NULL = np.uint64(0x9AE16A3B2F90404F), np.uint64(0xC3A5C85C97CB3127), np.uint64(1)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def key_hash(columns: Sequence[pa.Array | pa.ChunkedArray]) -> Hashes:
    """Return a hash of each row's key, uint64 [n], the same in every process and version.

    ``columns`` are the entity's key columns in order, strings or whole numbers. A null has a hash of
    its own. Each eight bytes are mixed by the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014).

    Raises:
        FeatureStoreError: A column holds neither strings nor whole numbers.
    """
    combined: Hashes | None = None
    for column in columns:
        hashes = _hash_column(column)
        combined = hashes if combined is None else _mix(combined * _FACTOR + hashes)
    return np.zeros(0, np.uint64) if combined is None else combined


def _hash_column(column: pa.Array | pa.ChunkedArray) -> Hashes:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_integer(array.type):
        words = np.asarray(pc.fill_null(array.cast(pa.int64()), 0).to_numpy()).view(np.uint64)
        hashes = _mix(words + _WHOLE)
        valid = None if not array.null_count else array.is_valid().to_numpy(zero_copy_only=False)
        return hashes if valid is None else np.where(valid, hashes, _NULL)
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    distinct = array.dictionary
    if not (pa.types.is_string(distinct.type) or pa.types.is_large_string(distinct.type)):
        raise FeatureStoreError(
            f"an entity key must be a string or a whole number, not {distinct.type}"
        )
    hashes = np.append(_hash_texts(distinct.cast(pa.large_string())), _NULL)
    places = pc.fill_null(array.indices.cast(pa.int64()), len(distinct))
    return hashes[places.to_numpy()]


def _hash_texts(texts: pa.Array) -> Hashes:
    """Hash strings without nulls, eight bytes of all of them at a time."""
    count = len(texts)
    if not count:
        return np.zeros(0, np.uint64)
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, "<i8")[texts.offset : texts.offset + count + 1]
    padded = np.zeros(int(bounds[-1]) + _WORD_BYTES, np.uint8)
    if data is not None:
        padded[: int(bounds[-1])] = np.frombuffer(data, np.uint8)[: int(bounds[-1])]
    # Every eight neighbouring bytes as a word, also those that begin at no multiple of eight.
    words = np.lib.stride_tricks.as_strided(
        padded[:_WORD_BYTES].view("<u8"), (len(padded) - _WORD_BYTES + 1,), (1,), writeable=False
    )
    starts, lengths = bounds[:-1], np.diff(bounds)
    hashes = _mix(lengths.astype(np.uint64) + _TEXT)
    open_ = np.flatnonzero(lengths > 0)
    for done in range(0, int(lengths.max()), _WORD_BYTES):
        open_ = open_[lengths[open_] > done]
        left = np.minimum(lengths[open_] - done, _WORD_BYTES).astype(np.uint64)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - left * np.uint64(8))
        word = words[starts[open_] + done] & mask
        hashes[open_] = _mix(hashes[open_] * _FACTOR + word)
    return hashes


def _mix(words: Hashes) -> Hashes:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
