"""When clients try again, and when they send twice: bounds that hold whatever happens."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray import Hedging, Retries, ServingError
from mlops_ray.serving.client.hedging import Hedger
from mlops_ray.serving.client.retries import Budget, retry_after_s

SECONDS = st.floats(0, 1e6)


@given(
    first=SECONDS,
    longest=SECONDS,
    failures=st.integers(1, 10**6),
    asked=st.none() | SECONDS,
    seed=st.integers(),
)
def test_a_pause_lies_between_what_was_asked_for_and_its_bound(
    first: float, longest: float, failures: int, asked: float | None, seed: int
) -> None:
    retries = Retries(first_pause_s=first, longest_pause_s=longest)
    pause_s = retries.pause_s(failures, asked, random.Random(seed))
    bound = min(Fraction(longest), Fraction(first) * 2 ** min(failures - 1, 2000))
    assert (asked or 0) <= pause_s <= (asked or 0) + float(bound) * (1 + 1e-9)


def test_pauses_fill_their_range_and_grow() -> None:
    draw = random.Random(1)
    retries = Retries(first_pause_s=0.1, longest_pause_s=0.5)
    for failures, bound in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (50, 0.5)):
        drawn = [retries.pause_s(failures, None, draw) for _ in range(2000)]
        assert min(drawn) < 0.05 * bound
        assert 0.95 * bound < max(drawn) <= bound
        assert np.mean(drawn) == pytest.approx(bound / 2, rel=0.1)


@given(
    share=st.integers(0, 100),
    reserve=st.integers(0, 20),
    steps=st.lists(st.booleans(), max_size=300),
)
def test_a_budget_lets_through_what_it_has_earned(
    share: int, reserve: int, steps: list[bool]
) -> None:
    budget = Budget(share / 100, reserve)
    balance, granted, calls = Fraction(reserve), 0, 0
    for earns in steps:
        if earns:
            budget.earn()
            calls += 1
            balance = min(Fraction(max(1, reserve)), balance + Fraction(share, 100))
        else:
            found = budget.spend()
            assert found == (balance >= 1)
            granted += found
            balance -= found
    assert granted <= reserve + Fraction(share, 100) * calls


def test_threads_cannot_overdraw_a_budget() -> None:
    budget = Budget(0.0, 500)
    granted: list[bool] = []
    threads = [
        threading.Thread(target=lambda: granted.extend(budget.spend() for _ in range(200)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 500


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=1200))
def test_a_hedge_waits_for_the_quantile_of_what_calls_took(latencies_s: list[float]) -> None:
    hedger = Hedger(Hedging())
    seen: list[float] = []
    for latency_s in latencies_s:
        hedger.learn(latency_s)
        seen.append(latency_s)
        if len(seen) < 20:
            assert hedger.begin() is None
        elif len(seen) == 20 or len(seen) % 32 == 0:
            expected = np.quantile(seen[-512:], 0.95, method="lower")
            assert hedger.begin() == pytest.approx(expected)


def test_a_given_delay_stays() -> None:
    hedger = Hedger(Hedging(after_s=0.2))
    for _ in range(100):
        hedger.learn(5.0)
    assert hedger.begin() == 0.2


def test_a_budget_without_a_reserve_lets_through_what_it_earns() -> None:
    budget = Budget(0.25, 0)
    granted = [budget.earn() or budget.spend() for _ in range(40)]
    assert sum(granted) == 10
    assert granted[:4] == [False, False, False, True]


def test_a_hedge_has_a_budget() -> None:
    hedger = Hedger(Hedging(after_s=0.0, share=0.5, reserve=2))
    granted = 0
    for _ in range(100):
        hedger.begin()
        granted += hedger.allow()
    assert 50 <= granted <= 52


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("3", 3.0),
        (" 0 ", 0.0),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
    ],
)
def test_retry_after(value: str | None, expected: float | None) -> None:
    assert retry_after_s(value) == expected


def test_retry_after_may_be_a_moment() -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=1000), usegmt=True)
    found = retry_after_s(moment)
    assert found is not None
    assert 900 < found <= 1000


@given(st.text(max_size=40))
def test_retry_after_takes_anything(value: str) -> None:
    found = retry_after_s(value)
    assert found is None or found >= 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first_pause_s": -1.0},
        {"longest_pause_s": -1.0},
        {"share": 1.1},
        {"share": -0.1},
        {"reserve": -1},
    ],
)
def test_retries_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ServingError):
        Retries(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"after_s": -1.0}, {"quantile": 1.0}, {"quantile": 0.0}, {"share": 2.0}]
)
def test_hedging_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ServingError):
        Hedging(**wrong)  # type: ignore[arg-type]
