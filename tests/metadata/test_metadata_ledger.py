"""What the ledger asks of its database; ``tests/contract`` has what it promises."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from mlops_ray.metadata import ledger as module
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import NewEvent, StepChange


@pytest.fixture
def ledger(home: Home) -> Ledger:
    return Ledger(home.ledger_url)


def finished(item: int) -> StepChange:
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    values = {"status": "succeeded", "key": f"k{item}", "ended_at": ended}
    return StepChange(run_id="r1", name="part", item=item, values=values)


def test_a_batch_of_any_size_takes_a_few_statements_and_one_commit(ledger: Ledger) -> None:
    statements: list[str] = []
    engine = ledger._backend._engine  # type: ignore[attr-defined]

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, *_more) -> None:  # type: ignore[no-untyped-def]
        statements.append(statement.split()[0])

    @sa.event.listens_for(engine, "commit")
    def note_commit(_connection) -> None:  # type: ignore[no-untyped-def]
        statements.append("COMMIT")

    ledger.apply(
        write
        for item in range(3000)
        for write in (finished(item), NewEvent(project="shop", kind="step", data={"n": item}))
    )
    assert statements == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert len(ledger.items("r1", "part")) == 3000


def test_more_keys_than_fit_in_one_query_are_all_found(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NAMES_PER_QUERY", 7)
    ledger.apply(finished(item) for item in range(50))
    found = ledger.cached(f"k{item}" for item in range(60))
    assert {key: step.item for key, step in found.items()} == {f"k{n}": n for n in range(50)}
