"""The database below the ledger: shared commits, repeated requests, errors in words."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres_server import PostgresServer

from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata import database as module
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.operations import Request
from mlops_ray.metadata.records import NewEvent
from mlops_ray.metadata.rows import batches, cell
from mlops_ray.metadata.schema import REQUESTS


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def appending(number: int, fence: tuple[str, int] | None = None, identity: str = "") -> Request:
    event = NewEvent(project="p", kind="k", data={"n": number})
    return Request("apply", (batches([event]), fence), identity)


def numbers(url: str) -> list[int]:
    return [event.data["n"] for event in Ledger(url).events()]


def test_of_requests_that_share_a_commit_each_is_whole_and_has_its_own_reply(url: str) -> None:
    database = Database(url)
    replies = database.write_all(
        [
            appending(0),
            Request("acquire", ("w", "me", 60.0, None)),
            appending(1, ("w", 7)),
            Request("nonsense", ()),
            appending(2, ("w", 1)),
        ]
    )
    assert [type(reply) for reply in replies] == [
        type(None),
        dict,
        LeaseError,
        KeyError,
        type(None),
    ]
    assert replies[1]["token"] == 1
    assert numbers(url) == [0, 2]


def test_a_locked_file_is_waited_for_once_by_all_that_share_a_commit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(url, patience_s=0.05)
    tries: list[int] = []
    plain = database._perform

    def perform(requests: Sequence[Request]) -> list[object]:
        tries.append(len(requests))
        return plain(requests)

    monkeypatch.setattr(database, "_perform", perform)
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    replies = database.write_all([appending(number) for number in range(3)])
    other.close()
    assert tries == [3]
    assert ["locked" in str(reply) for reply in replies] == [True] * 3


def test_a_request_that_is_sent_again_is_answered_and_not_repeated(url: str) -> None:
    database = Database(url)
    taking = Request("acquire", ("w", "me", 60.0, None), "one")
    first = database.write_all([taking, appending(0, identity="two")])
    again = [taking._replace(again=True), appending(0, identity="two")._replace(again=True)]
    assert database.write_all(again) == first
    assert database.write_all(again[::-1]) == first[::-1]
    # The first sending may come after the second: it must not be done either.
    (late,) = database.write_all([appending(0, identity="two")])
    assert isinstance(late, LedgerError)
    assert database.read("lease", "w")[0]["token"] == 1
    assert numbers(url) == [0]


def test_requests_are_forgotten_after_a_while(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REQUESTS_BETWEEN_CLEANINGS", 3)
    database = Database(url)
    engine = sa.create_engine(url)
    old = cell(datetime.now(UTC) - timedelta(hours=1))
    with engine.begin() as connection:
        connection.execute(REQUESTS.insert(), {"id": "old", "at": old, "reply": "null"})
    for number in range(3):
        database.write_all([appending(number, identity=f"new-{number}")])
    with engine.connect() as connection:
        kept = connection.execute(sa.select(REQUESTS.c.id)).scalars().all()
    assert sorted(kept) == ["new-0", "new-1", "new-2"]
    engine.dispose()


def test_a_file_that_has_to_be_there_is_not_made(url: str, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="not on this machine"):
        Database(url, create=False)
    assert not (tmp_path / "ledger.db").exists()
    Database(url).close()
    Database(url, create=False).close()


def test_every_commit_waits_for_the_disk(url: str) -> None:
    database = Database(url)
    with database._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_folder_in_the_place_of_the_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="folder cannot be used"):
        Database(f"sqlite:///{tmp_path / 'file' / 'ledger.db'}")


def test_a_reader_sees_a_whole_batch_or_nothing_of_it(url: str) -> None:
    ledger = Ledger(url)
    other = sqlite3.connect(url.removeprefix("sqlite:///"))
    other.execute("BEGIN")
    assert other.execute("SELECT count(*) FROM events").fetchone() == (0,)
    ledger.apply([NewEvent(project="p", kind="k") for _ in range(3)])
    assert other.execute("SELECT count(*) FROM events").fetchone() == (0,)
    other.execute("COMMIT")
    assert other.execute("SELECT count(*) FROM events").fetchone() == (3,)
    other.close()


def test_a_server_that_is_not_there_is_said_in_words_without_its_password() -> None:
    with pytest.raises(LedgerError, match="cannot be reached") as refused:
        Database("postgresql://me:secret@127.0.0.1:1/ledger", patience_s=0.1)
    assert "secret" not in str(refused.value)
    assert "MLOPS_RAY_LEDGER" in refused.value.fix


def test_a_server_that_does_not_let_us_in_is_not_asked_for_long(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    for wrong in (f"{url}x", url.replace("tester", "stranger")):
        with pytest.raises(LedgerError, match="does not let us in"):
            Database(wrong)


def test_a_row_that_another_transaction_holds_is_said_to_be_locked(
    postgres: PostgresServer,
) -> None:
    url = postgres.new_database()
    ledger = Ledger(url, patience_s=0.3)
    lease = ledger.acquire("w", "me", 60)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM leases FOR UPDATE")
        with pytest.raises(LedgerError, match="locked by another process"):
            ledger.renew(lease, 60)
    ledger.renew(lease, 60)
    engine.dispose()
    ledger.close()


def test_a_ledger_that_is_removed_or_replaced_is_not_written_into_the_void(
    url: str, tmp_path: Path
) -> None:
    ledger = Ledger(url)
    ledger.append("p", "first", {})
    shutil.rmtree(tmp_path)
    ledger.append("p", "second", {})
    assert [event.kind for event in Ledger(url).events()] == ["second"]
    other = Ledger(f"sqlite:///{tmp_path / 'other.db'}")
    other.append("p", "copy", {})
    other.close()
    for end in ("-wal", "-shm"):
        (tmp_path / f"ledger.db{end}").unlink(missing_ok=True)
    (tmp_path / "other.db").replace(tmp_path / "ledger.db")
    assert [event.kind for event in ledger.events()] == ["copy"]


def test_a_ledger_that_is_removed_while_it_is_written_to_is_written_anew(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(url)
    ledger = Ledger(database)
    plain = database._follow_file
    removals = [1]

    def follow() -> None:
        plain()
        if removals and removals.pop():
            for file in tmp_path.glob("ledger.db*"):
                file.unlink()

    monkeypatch.setattr(database, "_follow_file", follow)
    ledger.append("p", "acknowledged", {})
    assert [event.kind for event in Ledger(url).events()] == ["acknowledged"]
    removals += [1] * 100
    with pytest.raises(LedgerError, match="again and again"):
        ledger.append("p", "never", {})
