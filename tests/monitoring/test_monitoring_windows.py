from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import DataError
from mlops_ray.metadata.profile import Profile
from mlops_ray.monitoring.windows import ProfileWindows

START = datetime(2013, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)

additions = st.lists(
    st.tuples(st.sampled_from(["r1", "r2"]), st.integers(0, 20), st.integers(0, 50)), max_size=40
)


def profile(count: int) -> Profile:
    return Profile({"x": np.array([count, 1])}, count + 1)


def day(number: int) -> str:
    return (START + number * DAY).date().isoformat()


@settings(max_examples=80)
@given(additions, st.integers(0, 25 * 24), st.integers(1, 10), st.integers(0, 99))
def test_a_window_is_the_sum_of_the_days_it_touches(
    added: list[tuple[str, int, int]], now_h: int, window_d: int, seed: int
) -> None:
    windows = ProfileWindows()
    for digest, number, count in random.Random(seed).sample(added, len(added)):
        windows.add(digest, {day(number): profile(count)})
    now = START + timedelta(hours=now_h)
    since = now - window_d * DAY
    touched = [
        count
        for digest, number, count in added
        if digest == "r1" and START + number * DAY <= now and START + (number + 1) * DAY > since
    ]
    found = windows.window("r1", now, window_d * DAY)
    assert found.rows == sum(touched) + len(touched)
    if touched:
        assert found.counts["x"].tolist() == [sum(touched), len(touched)]
    windows.forget(now, window_d * DAY)
    assert windows.window("r1", now, window_d * DAY) == found
    assert ProfileWindows.from_json(windows.to_json()).window("r1", now, window_d * DAY) == found


def test_forget_bounds_memory() -> None:
    windows = ProfileWindows()
    for number in range(100):
        windows.add(f"r{number % 3}", {day(number): profile(1)})
        windows.forget(START + number * DAY, 7 * DAY)
    assert sum(len(days) for days in windows.to_json().values()) == 8


def test_a_bucket_that_is_no_day_is_refused() -> None:
    with pytest.raises(DataError, match="'soon' is not a day"):
        ProfileWindows().add("r", {"soon": profile(1)})
