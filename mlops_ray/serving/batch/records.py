"""Where the records of a text file end, so that workers can read parts of it: CSV and JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 23
_NEWLINE, _RETURN, _QUOTE, _COMMA = b'\n\r",'


class Span(NamedTuple):
    """Some records of a file: the first byte and how many bytes, the first record and how many."""

    offset: int
    length: int
    start: int
    records: int


class UnevenQuotesError(Exception):
    """Quotes stand where RFC 4180 has none: only a parser can tell where a record ends."""


def spans(file: Any, begin: int, piece_rows: int, *, quoted: bool) -> list[Span]:
    """Cut a file into spans of at most ``piece_rows`` records, from the byte ``begin`` on.

    Blank lines are no records. With ``quoted``, a line break inside quotes ends none; a file with
    quotes at odd places becomes one span.

    Args:
        file: A pyarrow file, open for random access.
        begin: Where the records begin, behind a header.
        piece_rows: Most records of a span.
        quoted: Whether quotes mean something: CSV.
    """
    try:
        return list(_cut(_ends(file, begin, quoted), begin, piece_rows))
    except UnevenQuotesError:
        lines = _cut(_ends(file, begin, False), begin, piece_rows)
        return [Span(begin, file.size() - begin, 0, sum(span.records for span in lines))]


def _cut(ends: Iterator[NDArray[np.int64]], begin: int, piece_rows: int) -> Iterator[Span]:
    offset = last = begin
    start = held = 0
    for found in ends:
        while held + len(found) >= piece_rows:
            taken = piece_rows - held
            last = int(found[taken - 1])
            yield Span(offset, last - offset, start, piece_rows)
            offset, start, held, found = last, start + piece_rows, 0, found[taken:]
        held += len(found)
        last = int(found[-1]) if len(found) else last
    if held:
        yield Span(offset, last - offset, start, held)


def _ends(file: Any, begin: int, quoted: bool) -> Iterator[NDArray[np.int64]]:
    """Yield, block by block, the places where a record ends: behind its line break."""
    place, inside, before, previous = begin, False, _NEWLINE, begin
    file.seek(begin)
    data = file.read(_BLOCK_BYTES)
    while data:
        following = file.read(_BLOCK_BYTES)
        block = np.frombuffer(data, np.uint8)
        breaks = block == _NEWLINE
        if quoted and _QUOTE in data:
            after = following[0] if following else _NEWLINE
            within = _within_quotes(block, inside, before, after)
            breaks &= ~within
            inside = bool(within[-1])
        elif inside:
            breaks[:] = False
        places = np.flatnonzero(breaks)
        found = places + place + 1
        lengths = np.diff(found, prepend=previous)
        returns = np.where(places > 0, block[places - 1], before) == _RETURN
        before = int(block[-1])
        previous = int(found[-1]) if len(found) else previous
        yield found[(lengths > 2) | ((lengths == 2) & ~returns)]
        place += len(block)
        data = following
    if inside:
        raise UnevenQuotesError
    if previous < place:
        yield np.array([place])


def _within_quotes(
    block: NDArray[np.uint8], inside: bool, before: int, after: int
) -> NDArray[np.bool_]:
    """Say of each byte whether it stands inside quotes; ``inside`` tells it of the last one before."""
    quotes = block == _QUOTE
    within = np.logical_xor.accumulate(quotes) ^ inside
    padded = np.concatenate([[before], block, [after]]).astype(np.uint8)
    places = np.flatnonzero(quotes)
    opens = within[places]
    left, right = padded[places[opens]], padded[places[~opens] + 2]
    if not (
        np.isin(left, (_COMMA, _NEWLINE, _RETURN, _QUOTE)).all()
        and np.isin(right, (_COMMA, _NEWLINE, _RETURN, _QUOTE)).all()
    ):
        raise UnevenQuotesError
    return within
