"""The writer: one for each home of a cluster, taken over to without a gap."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata import writer
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import NewEvent
from mlops_ray.metadata.writer import RemoteDatabase, Writer


@pytest.fixture
def own(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", Storage())


def backend(ledger: Ledger) -> Any:
    return ledger._backend


def test_without_ray_the_file_is_opened_directly(
    own: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert isinstance(backend(open_ledger(own)), Database)


def test_writes_while_the_writer_starts_are_neither_lost_nor_out_of_order(
    ray_cluster: Any, own: Home
) -> None:
    ledger = open_ledger(own)
    assert backend(ledger)._alone is not None
    count = 0
    while backend(ledger)._alone is not None:
        ledger.append("p", "k", {"n": count})
        count += 1
    for number in range(count, count + 5):
        ledger.append("p", "k", {"n": number})
    assert [event.data["n"] for event in ledger.events()] == list(range(count + 5))
    # What a second handle sees comes from the same actor.
    other = open_ledger(own)
    assert backend(other)._alone is None
    assert backend(other).actor._actor_id == backend(ledger).actor._actor_id
    assert len(other.events()) == count + 5


class Far(RemoteDatabase):
    """A process on another node."""

    def _place(self) -> tuple[str, int]:
        return "another node", 1


def handle(kind: type[RemoteDatabase], home: Home) -> Ledger:
    """Open a ledger whose writer runs and has said where it is."""
    import ray

    ray.get(RemoteDatabase(home.ledger_url).actor.place.remote())
    heard = threading.Event()

    class Heard(kind):  # type: ignore[misc, valid-type]
        def _leave_to_writer(self, answer: Any) -> None:
            super()._leave_to_writer(answer)
            heard.set()

    made = Heard(home.ledger_url)
    assert heard.wait(60)
    return Ledger(made)


@pytest.mark.parametrize("kind", [RemoteDatabase, Far])
def test_who_has_the_writers_file_at_hand_reads_it_himself(
    kind: type[RemoteDatabase], ray_cluster: Any, own: Home
) -> None:
    ledger = handle(kind, own)
    ledger.append("p", "k", {})
    assert len(ledger.events()) == 1
    assert (backend(ledger)._beside is not None) == (kind is RemoteDatabase)


def test_while_the_writer_is_away_who_has_its_file_at_hand_writes_himself(
    ray_cluster: Any, own: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = handle(RemoteDatabase, own), handle(Far, own)
    lease = near.acquire("w", "me", 600)

    class Away:
        def __getattr__(self, name: str) -> Any:
            raise RayActorError

    for ledger in (near, far):
        backend(ledger).actor = Away()
        monkeypatch.setattr(backend(ledger), "_find", lambda create: Away())
    monkeypatch.setattr(writer, "_AWAY_S", 0.2)
    near.apply([NewEvent(project="p", kind="k")], fence=lease)
    assert near.acquire("w", "me", 600).token == 2
    with pytest.raises(LeaseError):
        near.apply([NewEvent(project="p", kind="k")], fence=lease)
    for call in (lambda: far.append("p", "k", {}), far.events):
        with pytest.raises(LedgerError, match="does not answer"):
            call()
    assert len(near.events()) == 1


@pytest.mark.parametrize("kind", [RemoteDatabase, Far])
def test_a_write_whose_reply_is_lost_is_answered_and_not_repeated(
    kind: type[RemoteDatabase], ray_cluster: Any, own: Home
) -> None:
    ledger = handle(kind, own)
    actor = backend(ledger).actor

    class Dying:
        """The writer dies between its commit and its reply."""

        @property
        def write(self) -> Any:
            return self

        def remote(self, request: Any) -> Any:
            ray_cluster.get(actor.write.remote(request))
            raise RayActorError

    backend(ledger).actor = Dying()
    assert ledger.acquire("w", "me", 600).token == 1
    backend(ledger).actor = Dying()
    ledger.append("p", "k", {})
    assert len(ledger.events()) == 1
    assert ledger.acquire("w", "me", 600).token == 2


def test_whatever_fails_on_the_way_is_an_error_of_the_ledger(ray_cluster: Any, own: Home) -> None:
    database = backend(open_ledger(own))

    def fail(_again: bool) -> Any:
        raise KeyError("of the cluster's client")

    with pytest.raises(LedgerError, match="does not answer") as failed:
        database._ask(fail, lambda: None)
    assert "KeyError" in str(failed.value)
    with pytest.raises(LedgerError, match="KeyError: 'sent back'"):
        database._ask(lambda _again: KeyError("sent back"), lambda: None)


def test_handles_that_are_opened_at_once_share_one_writer(ray_cluster: Any, own: Home) -> None:
    opened: list[Ledger] = []
    threads = [threading.Thread(target=lambda: opened.append(open_ledger(own))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({backend(ledger).actor._actor_id for ledger in opened}) == 1


def test_a_process_whose_ray_has_ended_goes_on_by_itself(
    ray_cluster: Any, own: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(own)
    ray_cluster.get(backend(ledger).actor.pid.remote())
    ledger.append("p", "before", {})
    monkeypatch.setattr(ray_cluster, "is_initialized", lambda: False)
    ledger.append("p", "after", {})
    assert [event.kind for event in ledger.events()] == ["before", "after"]
    ledger.close()


def test_on_another_node_no_second_empty_ledger_is_begun(ray_cluster: Any, own: Home) -> None:
    actor = ray_cluster.remote(Writer).options(num_cpus=0).remote(own.ledger_url, "another node")
    error = ray_cluster.get(actor.read.remote("runs", ({}, 1)))
    assert isinstance(error, LedgerError)
    assert "not on this machine" in error.why
    assert not own.root.exists()
    # Once it is there, because the folder is shared, it is used.
    Ledger(own.ledger_url).append("p", "k", {})
    assert len(ray_cluster.get(actor.read.remote("events", ({}, 0, None)))) == 1
    ray_cluster.kill(actor)


def test_a_damaged_file_is_said_to_be_damaged_through_the_writer(
    ray_cluster: Any, own: Home
) -> None:
    own.root.mkdir()
    (own.root / "ledger.db").write_text("this is no ledger" * 1000)
    with pytest.raises(LedgerError, match="damaged") as first:
        open_ledger(own)
    with pytest.raises(LedgerError, match="damaged") as second:
        open_ledger(own).runs()
    assert str(pickle.loads(pickle.dumps(second.value))) == str(first.value)
