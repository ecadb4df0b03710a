"""How many distinct values there are, about, from a few bytes: HyperLogLog.

A value's hash names one of 1,024 registers and, by its leading zeros, a rank; a register keeps the
highest rank that it has met. Registers of two sets merge by maximum, so the estimate is the same for
every order and every way to cut rows into batches. Its relative standard error is 1.04/√1024 = 3.3 %
(Flajolet, Fusy, Gandouet and Meunier, "HyperLogLog", AofA 2007), and it is nearly exact for small
numbers.

A **code** is a register and a rank in one small number; a set is an array of codes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.errors import SchemaError
from mlops_ray.features.keys import key_hash

Codes = NDArray[np.uint16]
Ints = NDArray[np.int64]

_REGISTER_BITS = 10
_REGISTERS = 1 << _REGISTER_BITS
_RANKS = 64 - _REGISTER_BITS + 2
_RANK_BITS = 6


def codes_of(values: pa.Array | pa.ChunkedArray, where: str = "") -> Codes:
    """Return the code of each value, of any type that is not nested; that of a null means nothing.

    Equal values of one type have equal codes in every process; 0.0 and −0.0 are equal, and so are all
    NaN.

    Raises:
        SchemaError: The values are lists, structs or maps.
    """
    hashes = key_hash([_hashable(values, where)])
    register = hashes >> np.uint64(64 - _REGISTER_BITS)
    rest = hashes << np.uint64(_REGISTER_BITS)
    return ((register << np.uint64(_RANK_BITS)) | _rank(rest)).astype(np.uint16)


def reduce_codes(codes: Codes, owner: Ints) -> tuple[Codes, Ints]:
    """Keep the highest code of each owner's registers; return codes and owners, in order of both."""
    if not len(codes):
        return codes, owner
    packed = np.sort((owner << 16) | codes)
    last = np.append((packed[1:] >> _RANK_BITS) != (packed[:-1] >> _RANK_BITS), True)
    packed = packed[last]
    return (packed & 0xFFFF).astype(np.uint16), packed >> 16


def estimate(codes: Codes, owner: Ints, owners: int) -> Ints:
    """Return about how many distinct values the codes of each owner 0, 1, …, stand for, int64.

    The estimator is "improved raw estimation" of Ertl, "New cardinality estimation algorithms for
    HyperLogLog sketches" (2017), algorithm 6: unbiased over the whole range without tables.
    """
    codes, owner = reduce_codes(codes, owner)
    rank = (codes & ((1 << _RANK_BITS) - 1)).astype(np.int64)
    counts = np.bincount(owner * _RANKS + rank, minlength=owners * _RANKS).reshape(owners, _RANKS)
    counts[:, 0] = _REGISTERS - counts[:, 1:].sum(axis=1)
    total = _REGISTERS * _tau(1.0 - counts[:, -1] / _REGISTERS)
    for rank_value in range(_RANKS - 2, 0, -1):
        total = 0.5 * (total + counts[:, rank_value])
    with np.errstate(divide="ignore"):
        total = total + _REGISTERS * _sigma(counts[:, 0] / _REGISTERS)
        distinct = _REGISTERS**2 / (2.0 * np.log(2.0)) / total
    return np.rint(distinct).astype(np.int64)


def _hashable(values: pa.Array | pa.ChunkedArray, where: str) -> pa.Array | pa.ChunkedArray:
    """Return values as strings or whole numbers, one for one."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _hashable(values.cast(kind.value_type), where)
    if pa.types.is_uint64(kind):
        return values.cast(pa.int64(), safe=False)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind):
        return values
    if pa.types.is_floating(kind):
        numbers = np.asarray(pc.fill_null(values.cast(pa.float64()), 0.0).to_numpy())
        one_nan = np.where(np.isnan(numbers), np.nan, numbers + 0.0)
        return pa.array(one_nan.view(np.int64))
    if pa.types.is_boolean(kind):
        return values.cast(pa.int8())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return values.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    if pa.types.is_nested(kind):
        raise SchemaError(
            f"distinct values of type {kind} cannot be counted",
            where=where,
            fix="make a column of texts or numbers of it in the source's clean function",
        )
    # Bytes need not be valid UTF-8 to be hashed.
    return values.cast(pa.string(), safe=False)


def _rank(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one more than the number of leading zeros, at most 55."""
    upper, lower = words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)
    # Half a word is exact as a float, whose exponent is its number of bits.
    bits = np.where(upper > 0, np.frexp(upper)[1] + 32, np.frexp(lower)[1])
    return np.minimum(65 - bits, _RANKS - 1).astype(np.uint64)


def _sigma(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x + Σ x^(2^k)·2^(k−1) over k ≥ 1; infinite at 1."""
    power = np.where(share == 1.0, 0.0, share)
    total, factor = power.copy(), 1.0
    while True:
        power = power * power
        step = total + power * factor
        if np.array_equal(step, total):
            break
        total, factor = step, 2.0 * factor
    return np.where(share == 1.0, np.inf, total)


def _tau(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (1 − x − Σ (1 − x^(2^−k))²·2^−k) / 3 over k ≥ 1; 0 at 0 and 1."""
    total, root, factor = 1.0 - share, share.copy(), 1.0
    while True:
        root, factor = np.sqrt(root), 0.5 * factor
        step = total - (1.0 - root) ** 2 * factor
        if np.array_equal(step, total):
            break
        total = step
    return np.where((share == 0.0) | (share == 1.0), 0.0, total / 3.0)
