"""What the tests of the contract share: inputs at random, and comparisons with the oracle."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from contract import oracle, second_opinion, world
from contract.world import KEYS, NAMES, TTLS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

WAYS = ("one", "many", "buckets", "compacted")
FEATURES = world.declare()

_moments = st.integers(-30, 30)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "shop": st.sampled_from(["north", "süd", "", "n\x00rth", None]),
            "shelf": st.sampled_from([1, 2, -1, None]),
            "event": _moments,
            "created": _moments,
            "price": st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf"), 1.5]),
            "stock": st.sampled_from([None, 0, 2**53 + 1, -(2**63), 2**63 - 1]),
            "open": st.sampled_from([None, True, False]),
            "note": st.sampled_from([None, "", "ü", "\x00", "long " * 90]),
            "since": st.sampled_from([None, -1, 0, 2**50]),
        }
    ),
    max_size=14,
    unique_by=lambda item: (item["shop"], item["shelf"], item["event"], item["created"]),
)
LABELS = st.lists(
    st.fixed_dictionaries(
        {
            "shop": st.sampled_from(["north", "süd", "", "n\x00rth", "nobody", None]),
            "shelf": st.sampled_from([1, 2, -1, 3, None]),
            "at": st.integers(-40, 50),
        }
    ),
    min_size=1,
    max_size=10,
)


def many(count: int) -> Any:
    """Settings of a property that is tried with ``count`` inputs."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def examples(request: pytest.FixtureRequest, quick: int, slow: int) -> int:
    """How many inputs to try: Ray and Redis cost more by the input."""
    return slow if "ray" in request.node.name or "redis" in request.node.name else quick


def stored(
    folder: Path, view: str, rows: Sequence[Mapping[str, Any]], how: str = "one", **changes: Any
) -> Any:
    """A new offline store with rows in a view."""
    features = world.declare(**changes)
    store = world.open_offline(folder / uuid.uuid4().hex, features)
    world.fill(store, features, view, rows, how)
    return store


def check_join(
    engine: Any,
    folder: Path,
    view: str,
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[Mapping[str, Any]],
    how: str = "one",
    known_only: bool = True,
    buckets: int = 4,
) -> None:
    """The engine agrees with the oracle, and DuckDB with both."""
    store = stored(folder, view, rows, how, offline={"buckets": buckets})
    ttl = TTLS.get(view)
    keys = KEYS.get(view, KEYS["item"])
    due = oracle.join(labels, rows, keys, NAMES, ttl, known_only)
    asked = world.label_table(labels)
    whole = world.table(FEATURES, view, rows)
    world.assert_equal(second_opinion.join(asked, whole, keys, NAMES, ttl, known_only), due)
    world.assert_equal(engine(FEATURES, view, store, asked, known_only), due)


def assert_statuses(found: Sequence[Mapping[str, Any]], due: Sequence[Mapping[str, Any]]) -> None:
    """Every value and status of every key is what it should be."""
    for ours, theirs in zip(found, due, strict=True):
        for name, (value, status) in theirs.items():
            assert ours[name][1] == status, (name, ours[name], theirs[name])
            assert world.equal(ours[name][0], value), (name, ours[name], theirs[name])


def label_source(labels: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Labels as the cleaned rows of the label source; three ids, so that some come twice."""
    asked = world.label_table(labels).drop_columns(["number"])
    count = len(labels)
    columns = {
        "id": [f"l{number % 3}" for number in range(count)],
        "label": pa.array([number % 2 for number in range(count)], pa.int8()),
        "known_at": asked["at"],
        "shop_note": [f"untouched {number}" for number in range(count)],
    }
    for name, values in columns.items():
        asked = asked.append_column(name, pa.chunked_array([values]))
    return asked
