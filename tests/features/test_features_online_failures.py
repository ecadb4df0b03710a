"""Reads without an online store: fail, find nothing, or use what was read before."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.features.online.failures import Fallback, ServerGoneError

GONE = ServerGoneError("the store does not answer")


class Store:
    """Two views by key; ``asked`` counts."""

    def __init__(self) -> None:
        self.rows: list[dict[bytes, bytes]] = [{b"a": b"1", b"b": b"2"}, {b"x": b"9"}]
        self.gone = False
        self.asked = 0

    def fetch(self, keys: Any) -> Any:
        self.asked += 1
        if self.gone:
            raise GONE
        return [
            [None if key is None else rows.get(key) for key in column]
            for column, rows in zip(keys, self.rows, strict=True)
        ]

    def read(self, fallback: Fallback, *keys: Any) -> Any:
        return fallback.read(keys, lambda: self.fetch(keys))


ALL: Any = ([b"a", b"b", b"c", None], [b"x", b"x", b"y", b"x"])
FOUND = [[b"1", b"2", None, None], [b"9", b"9", None, b"9"]]


def test_stale_finds_what_was_read_last() -> None:
    store, fallback = Store(), Fallback("stale", 2, silent_s=0)
    assert store.read(fallback, *ALL) == FOUND
    store.rows[0][b"a"] = b"3"
    store.rows[0][b"d"] = b"4"
    store.read(fallback, [b"a"], [b"x"])
    assert fallback.degraded == ""
    store.gone = True
    later = store.read(fallback, [b"a", b"b", b"c", b"d", None], [b"x"] * 5)
    assert later == [[b"3", b"2", None, None, None], [b"9"] * 5]
    assert fallback.degraded == "stale"
    store.gone = False
    assert store.read(fallback, [b"d"], [b"x"]) == [[b"4"], [b"9"]]
    assert fallback.degraded == ""


def test_missing_finds_nothing_and_error_raises() -> None:
    store = Store()
    missing, error = Fallback("missing", 2, 0), Fallback("error", 2, 0)
    for fallback in (missing, error):
        assert store.read(fallback, *ALL) == FOUND
    store.gone = True
    assert store.read(missing, *ALL) == [[None] * 4] * 2
    assert missing.degraded == "missing"
    with pytest.raises(ServerGoneError):
        store.read(error, *ALL)
    store.gone = False
    assert store.read(error, *ALL) == FOUND


@pytest.mark.parametrize("mode", ["error", "missing", "stale"])
def test_a_store_that_is_gone_is_left_alone_for_a_while(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("mlops_ray.features.online.failures.time.monotonic", lambda: now_s)
    store, fallback = Store(), Fallback(mode, 2, silent_s=5)
    store.gone = True

    def read() -> Any:
        try:
            return store.read(fallback, [b"a"], [b"x"])
        except ServerGoneError:
            return None

    for _ in range(3):
        read()
    assert store.asked == 1
    store.gone = False
    now_s += 4.9
    assert read() != [[b"1"], [b"9"]]
    now_s += 0.2
    assert read() == [[b"1"], [b"9"]]
    assert store.asked == 2


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 10))
@settings(deadline=None)
def test_a_bounded_number_is_kept_those_last_read(read: list[int], most: int) -> None:
    store, fallback = Store(), Fallback("stale", 1, 0, most)
    keys = [b"%d" % number for number in range(31)]
    store.rows = [{key: key for key in keys}]
    for number in read:
        store.read(fallback, [keys[number]])
    store.gone = True
    found = store.read(fallback, keys)[0]
    newest = list(dict.fromkeys(reversed(read)))[:most]
    assert {int(value) for value in found if value is not None} == set(newest)


def test_keys_without_a_row_take_no_place() -> None:
    store, fallback = Store(), Fallback("stale", 1, 0, most=10)
    real = [b"real%d" % number for number in range(10)]
    store.rows = [dict.fromkeys(real, b"row")]
    store.read(fallback, real)
    store.read(fallback, [b"junk%d" % number for number in range(50)])
    del store.rows[0][real[0]]
    store.read(fallback, real[:1])
    store.gone = True
    assert store.read(fallback, real) == [[None] + [b"row"] * 9]


def test_an_error_that_is_kept_does_not_grow() -> None:
    store, fallback = Store(), Fallback("error", 2, silent_s=60)
    store.gone = True

    def frames() -> int:
        with pytest.raises(ServerGoneError, match="does not answer") as caught:
            store.read(fallback, *ALL)
        return len(caught.traceback)

    frames()
    assert len({frames() for _ in range(20)}) == 1
    assert store.asked == 1


def test_what_a_thread_is_told_is_of_its_own_read() -> None:
    store, fallback = Store(), Fallback("stale", 2, silent_s=0)
    store.gone = True
    store.read(fallback, *ALL)
    assert fallback.is_gone
    store.gone = False
    other = threading.Thread(target=store.read, args=(fallback, *ALL))
    other.start()
    other.join()
    assert fallback.degraded == "stale"
    assert not fallback.is_gone
