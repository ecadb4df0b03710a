"""The writer: one for each home of a cluster, taken over to without a gap."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger


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


@pytest.mark.parametrize("is_near", [True, False])
def test_who_has_the_writers_file_at_hand_reads_it_himself(
    is_near: bool, ray_cluster: Any, own: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.metadata import writer

    ray_cluster.get(backend(open_ledger(own)).actor.place.remote())
    if not is_near:
        # A file of the same name on another file system.
        monkeypatch.setattr(writer, "_file_number", lambda url: -1)
    ledger = open_ledger(own)
    assert ledger.events() == []
    await_place(ledger)
    ledger.append("p", "k", {})
    assert len(ledger.events()) == 1
    assert (backend(ledger)._reader is not None) == is_near


def await_place(ledger: Ledger) -> None:
    answered = threading.Event()
    actor = backend(ledger).actor
    actor.place.remote().future().add_done_callback(lambda _: answered.set())
    assert answered.wait(60)
    # Calls of one handle may end in any order: give the one before this time to be taken in.
    deadline = time.monotonic() + 5
    while backend(ledger)._reader is None and time.monotonic() < deadline:
        if backend(ledger)._place() != ray_place(actor):
            return
        time.sleep(0.01)


def ray_place(actor: Any) -> Any:
    import ray

    return ray.get(actor.place.remote())


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
    from mlops_ray.metadata.writer import Writer

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
