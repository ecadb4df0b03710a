"""The contract, points 6 and 7: late data and corrections."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from contract import oracle, world
from contract.checks import (
    FEATURES,
    LABELS,
    ROWS,
    WAYS,
    assert_statuses,
    check_join,
    examples,
    many,
    stored,
)
from contract.world import KEYS, NAMES, TTLS, label, row
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("known_only", [True, False])
def test_06_late_data_offline(engine: Any, known_only: bool, tmp_path: Path) -> None:
    rows = [row(10), row(20, 500, price=2.0), row(15, 30, price=3.0), row(20, 25, price=4.0)]
    labels = [label(at) for at in (9, 10, 19, 20, 24, 25, 30, 499, 500, 10**6)]
    check_join(engine, tmp_path, "item", rows, labels, known_only=known_only)
    store = stored(tmp_path, "item", rows)
    found = engine(FEATURES, "item", store, world.label_table(labels), known_only)
    due = [None, 10.0, 10.0, 10.0, 10.0, 4.0, 4.0, 4.0, 2.0, 2.0]
    anyway = [None, 10.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert [item["price"] for item in found] == (due if known_only else anyway)


@pytest.mark.parametrize("how", WAYS)
def test_06_the_cutoff_off_agrees_with_the_oracle(
    engine: Any, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    @many(examples(request, 10, 2))
    @given(ROWS, LABELS, st.sampled_from(list(TTLS)))
    def check(rows: Any, labels: Any, view: str) -> None:
        check_join(engine, tmp_path, view, rows, labels, how, known_only=False)

    check()


def test_06_many_late_rows_of_one_entity(engine: Any, tmp_path: Path) -> None:
    """All of an entity's rows were created late: each label steps back over all of them."""
    rows = [row(event, 10**9 + event) for event in range(300)]
    rows += [row(-1, -1, price=7.0)]
    check_join(engine, tmp_path, "item", rows, [label(at) for at in range(0, 400, 7)], "many")


def test_06_an_older_arrival_never_overwrites_online(open_store: Any) -> None:
    rows = [row(10, 10), row(9, 50, price=1.0), row(10, 9, price=2.0)]
    for number, order in enumerate(itertools.permutations(rows)):
        online = open_store(FEATURES, str(number))
        for item in order:
            online.write("item", [item])
        (found,) = online.look_up("item", [label(100)])
        assert found["price"] == (10.0, "present")


def test_06_late_rows_reach_incremental_materialisation(open_store: Any, tmp_path: Path) -> None:
    online = open_store(FEATURES)
    rows = [row(1000), row(1000, shelf=2)]
    store = stored(tmp_path, "item", rows)
    online.materialize(store, "item")
    late = [row(500, 2000, shelf=3), row(400, 2000, price=9.0), row(1500, 2000, shelf=2)]
    store.append("item", world.table(FEATURES, "item", late), 2000)
    online.materialize(store, "item")
    asked = [label(5000), label(5000, shelf=2), label(5000, shelf=3)]
    found = online.look_up("item", asked)
    assert [item["price"] for item in found] == [
        (1000.0, "present"),
        (1500.0, "present"),
        (500.0, "present"),
    ]
    assert online.materialize(store, "item") == 0
    assert_statuses(online.look_up("item", asked), found)


def test_06_any_course_of_appends_reaches_the_online_store(
    open_store: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Appends, compactions, materialisations in any order; at the end both stores agree."""
    count = itertools.count()
    steps = st.lists(
        st.tuples(st.sampled_from(["append", "append", "compact", "materialize"]), ROWS),
        min_size=2,
        max_size=8,
    )

    @many(examples(request, 12, 6))
    @given(steps, LABELS)
    def check(course: Any, labels: Any) -> None:
        store = stored(tmp_path, "item", [])
        online = open_store(FEATURES, str(next(count)))
        kept: list[Mapping[str, Any]] = []
        for number, (action, rows) in enumerate(course, 1):
            if action == "append":
                # Later appends are created later; their events lie anywhere.
                later = [item | {"created": 100 * number + item["created"]} for item in rows]
                store.append("item", world.table(FEATURES, "item", later), 100 * number + 50)
                kept += later
            elif action == "compact":
                world.compact(store, "item")
            else:
                online.materialize(store, "item")
        online.materialize(store, "item")
        after = [item | {"at": 10_000 + item["at"]} for item in labels]
        due = [oracle.look_up(item, kept, KEYS["item"], NAMES, None) for item in after]
        assert_statuses(online.look_up("item", after), due)
        assert online.materialize(store, "item") == 0

    check()


def test_07_both_stores_show_a_correction(engine: Any, open_store: Any, tmp_path: Path) -> None:
    online = open_store(FEATURES)
    store = stored(tmp_path, "item", [row(10, 10, note="wrong")])
    online.materialize(store, "item")
    store.append("item", world.table(FEATURES, "item", [row(10, 20, note="right")]), 20)
    online.materialize(store, "item")
    asked = [label(19), label(20), label(90)]
    found = engine(FEATURES, "item", store, world.label_table(asked))
    assert [item["note"] for item in found] == ["wrong", "right", "right"]
    assert [item["note"] for item in online.look_up("item", asked)] == [
        (None, "not found"),
        ("right", "present"),
        ("right", "present"),
    ]
