"""What every ledger owes: SQLite and PostgreSQL, opened directly or through the writer."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from contract import ledgers as work
from contract.ledgers import Ledgers, run_record

from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.journal import Journal
from mlops_ray.metadata.records import Firing, Link, NewEvent, NewKey, StepChange
from mlops_ray.metadata.rows import cell

REF = ArtifactRef(digest="d" * 64, kind="json", size=2, rows=None)


def event(number: int) -> NewEvent:
    return NewEvent(project="shop", kind="count", data={"n": number})


def test_a_run_and_its_steps_come_back_as_written(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    written = run_record(reason="trigger nightly")
    ledger.start_run(written, ["b", "a"])
    assert ledger.run("r1") == written
    assert [(s.name, s.status) for s in ledger.steps("r1")] == [("b", "pending"), ("a", "pending")]
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    values = {"status": "succeeded", "key": "k", "output": REF, "ended_at": moment, "rows": 7}
    ledger.apply([StepChange(run_id="r1", name="b", values=values)])
    step = ledger.steps("r1")[0]
    assert (step.output, step.rows, step.key, step.ended_at) == (REF, 7, "k", moment)
    ledger.finish_run("r1", "succeeded")
    finished = ledger.run("r1")
    assert finished is not None
    assert finished.ended_at is not None
    ledger.resume_run("r1", "other:1:1", {"commit": "def"})
    resumed = ledger.run("r1")
    assert resumed is not None
    assert (resumed.status, resumed.owner, resumed.ended_at) == ("running", "other:1:1", None)
    assert resumed.provenance == {"commit": "def"}
    assert ledger.run("none") is None


def test_the_same_run_is_not_started_twice(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    ledger.start_run(run_record(), ["a"])
    with pytest.raises(LedgerError, match="in the ledger already"):
        ledger.start_run(run_record(owner="another"), ["a", "b"])
    assert len(ledger.steps("r1")) == 1


def test_runs_and_their_steps_are_read_many_at_a_time(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    for run_id in ("r2", "r1"):
        ledger.start_run(run_record(run_id), ["b", "a"])
    ledger.apply([StepChange(run_id="r1", name="a", item=0, values={"status": "running"})])
    assert ledger.steps_of(["r1", "none", "r2", "r1"]) == [*ledger.steps("r1"), *ledger.steps("r2")]
    assert len(ledger.runs(limit=None)) == 2
    assert ledger.steps_of([]) == []


def test_the_calls_of_a_mapped_step_are_apart_from_it(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    ledger.start_run(run_record(), ["a"])
    ledger.apply(
        [
            StepChange(run_id="r1", name="a", item=item, values={"status": "running"})
            for item in (10, 2, 0)
        ]
    )
    assert [item.item for item in ledger.items("r1", "a")] == [0, 2, 10]
    assert [(step.name, step.status) for step in ledger.steps("r1")] == [("a", "pending")]


def test_a_batch_is_written_whole_or_not_at_all(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    lease = ledger.acquire("w", "me", 60)
    change = StepChange(run_id="r1", name="a", values={"status": "running"})
    ledger.acquire("w", "other", 60, dead=lease)
    with pytest.raises(LeaseError, match="taken over"):
        ledger.apply([event(1), change, NewKey(key="k", parts={})], fence=lease)
    unknown = StepChange(run_id="r1", name="a", values={"colour": "red"})
    with pytest.raises(ValueError, match="colour"):
        ledger.apply([event(1), change, unknown])
    assert ledger.events() == []
    assert ledger.steps("r1") == []
    assert ledger.key_parts("k") is None


def test_keys_and_links_are_kept_once(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    link = Link(run_id="r1", step="a", direction="writes", kind="model", name="flights@7")
    ledger.apply([NewKey(key="k", parts={"a": 1}), link, link])
    ledger.apply([NewKey(key="k", parts={"a": 2}), link])
    assert ledger.key_parts("k") == {"a": 1}
    assert ledger.parts_of(["none", "k", "k"]) == {"k": {"a": 1}}
    assert ledger.links(kind="model", name="flights@7") == [link]
    assert ledger.links(direction="reads") == []


def test_the_newest_finished_step_with_a_key_is_found(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    for number, status in enumerate(("succeeded", "cached", "failed")):
        run_id = f"r{number}"
        ledger.start_run(run_record(run_id), ["a"])
        ended = datetime(2020, 1, 1 + number, tzinfo=UTC)
        values = {"status": status, "key": "k", "output": REF, "ended_at": ended}
        ledger.apply([StepChange(run_id=run_id, name="a", values=values)])
    found = ledger.cached(["none", "k", "k"])
    assert [(key, step.run_id) for key, step in found.items()] == [("k", "r1")]
    latest = ledger.latest("shop", "a")
    assert latest is not None
    assert latest.run_id == "r1"
    assert ledger.latest("other", "a") is None


def test_events_keep_their_order_and_are_filtered(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    for number in range(3):
        ledger.append("shop", "drift", {"n": number}, run_id="r1" if number else None)
    ledger.append("other", "drift", {})
    first, *others = ledger.events(project="shop")
    assert [event.data["n"] for event in (first, *others)] == [0, 1, 2]
    assert [event.data["n"] for event in ledger.events(run_id="r1", kind="drift")] == [1, 2]
    assert [event.data.get("n") for event in ledger.events(after=first.id, limit=2)] == [1, 2]


def test_text_that_databases_refuse_is_kept_as_well_as_it_can_be(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    data = {"text": "a\0b\ud800", "number": float("inf")}
    values = {"message": "a\0b", "error": "half \ud800", "params": data}
    ledger.apply([StepChange(run_id="r1", name="a", values=values)])
    (step,) = ledger.steps("r1")
    assert (step.message, step.error, step.params) == ("a�b", "half ?", data)


def test_a_lease_has_one_owner_until_it_ends(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    first = ledger.acquire("w", "me", 60)
    with pytest.raises(LeaseError) as refused:
        ledger.acquire("w", "other", 60)
    assert refused.value.lease == ledger.lease("w") == first
    assert ledger.acquire("w", "me", 60).token == 2
    expired = ledger.acquire("w", "other", -1, dead=ledger.lease("w"))
    third = ledger.acquire("w", "me", 60)
    assert (expired.token, third.token) == (3, 4)
    for stale in (first, expired):
        with pytest.raises(LeaseError):
            ledger.renew(stale, 60)
        with pytest.raises(LeaseError):
            ledger.finish_run("r1", "failed", fence=stale)
        with pytest.raises(LeaseError):
            ledger.resume_run("r1", "me", {}, fence=stale)
        ledger.release(stale)
    longer = ledger.renew(third, 600)
    assert longer.expires_at - third.expires_at > timedelta(seconds=500)
    assert ledger.lease("w") == longer
    ledger.release(third)
    assert ledger.acquire("w", "other", 60).token == 5
    assert ledger.lease("never") is None
    with pytest.raises(LeaseError):
        ledger.renew(first.model_copy(update={"name": "never"}), 60)


def test_firings_are_recorded_once_and_changed(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    given = {"project": "shop", "trigger": "nightly", "status": "due"}
    firings = [
        Firing(key=f"nightly@{day}", at=moment + timedelta(days=day), data={"day": day}, **given)
        for day in range(3)
    ]
    assert [ledger.fire(firing) for firing in firings] == [True, True, True]
    assert not ledger.fire(firings[1].model_copy(update={"reason": "again"}))
    assert ledger.firings(project="shop") == firings[::-1]
    ledger.update_firing("nightly@1", status="submitted", job="j", attempt=2, data={"a": 1})
    (changed,) = ledger.firings(status="submitted")
    assert (changed.key, changed.job, changed.attempt, changed.data) == (
        "nightly@1",
        "j",
        2,
        {"a": 1},
    )
    assert ledger.firings(trigger="other") == []
    assert len(ledger.firings(limit=1)) == 1
    assert ledger.firings(begun=True) == [changed]
    assert [firing.key for firing in ledger.firings(not_like="nightly@1")] == [
        "nightly@2",
        "nightly@0",
    ]
    assert ledger.firings(not_like="nightly_")[0].key == "nightly@2"


def test_a_firing_and_its_event_are_one_write(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    lease = ledger.acquire("triggers/shop", "one", 60)
    given = {"project": "shop", "trigger": "t", "status": "due", "at": datetime.now(UTC)}
    firing = Firing.model_validate({"key": "t@1", **given})
    due, ended = (NewEvent(project="shop", kind=f"firing_{end}") for end in ("due", "failed"))
    assert ledger.fire(firing, event=due, fence=lease)
    assert not ledger.fire(firing, event=due, fence=lease)
    ledger.update_firing("t@1", event=ended, fence=lease, status="failed")
    ledger.acquire("triggers/shop", "two", 60, dead=lease)
    with pytest.raises(LeaseError):
        ledger.update_firing("t@1", event=ended, fence=lease, status="due")
    assert [event.kind for event in ledger.events()] == ["firing_due", "firing_failed"]


def test_a_run_is_unmirrored_from_its_end_until_it_is_mirrored(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    ledger.start_run(run_record(), [])
    assert ledger.unmirrored() == []
    ledger.finish_run("r1", "failed")
    assert [run.run_id for run in ledger.unmirrored()] == ["r1"]
    (ended,) = ledger.unmirrored()
    ledger.resume_run("r1", "me", {})
    ledger.finish_run("r1", "succeeded")
    # Resumed while it was being mirrored: what is shown is how it ended before.
    ledger.append("shop", "mirrored", {"ended_at": cell(ended.ended_at)}, run_id="r1")
    (again,) = ledger.unmirrored()
    ledger.append("shop", "mirrored", {"ended_at": cell(again.ended_at)}, run_id="r1")
    assert ledger.unmirrored() == []


def test_of_processes_that_want_a_lease_at_once_one_gets_it(ledgers: Ledgers) -> None:
    won = ledgers.in_processes(work.race, [(f"owner-{number}", 30) for number in range(4)])
    names = [name for tokens in won for name in tokens]
    assert sorted(names) == sorted(f"lease-{number}" for number in range(30))
    assert {token for tokens in won for token in tokens.values()} == {1}


def test_processes_that_write_at_once_lose_nothing(ledgers: Ledgers) -> None:
    ledgers.in_processes(work.append, [(f"writer-{number}", 50) for number in range(4)])
    ledger = ledgers.open()
    events = ledger.events(project="shop")
    assert len(events) == 200
    assert [event.id for event in events] == sorted({event.id for event in events})
    for number in range(4):
        mine = [event.data["n"] for event in events if event.data["by"] == f"writer-{number}"]
        assert mine == list(range(50))
    assert {step.name: step.rows for step in ledger.steps("r1")} == {
        f"writer-{number}": 49 for number in range(4)
    }


def test_a_stale_owner_writes_nothing_after_its_lease_was_taken(ledgers: Ledgers) -> None:
    written = ledgers.in_processes(work.usurp, [(f"owner-{number}", 1.5) for number in range(3)])
    events = ledgers.open().events(kind="fenced")
    tokens = [event.data["token"] for event in events]
    assert tokens == sorted(tokens)
    assert len(tokens) == sum(written) > 0
    assert len(set(tokens)) > 3


def test_one_who_reads_on_misses_no_event(ledgers: Ledgers) -> None:
    seen: list[list[int]] = []
    reading = threading.Thread(target=lambda: seen.append(work.follow(ledgers.home, 200)))
    ledgers.open().close()
    reading.start()
    ledgers.in_processes(work.append, [(f"writer-{number}", 50) for number in range(4)])
    reading.join()
    assert seen[0] == [event.id for event in ledgers.open().events()]


def test_an_occasion_fires_once_whoever_sees_it(ledgers: Ledgers) -> None:
    fired = ledgers.in_processes(work.claim, [(f"by-{number}", 30) for number in range(3)])
    keys = [key for some in fired for key in some]
    assert sorted(keys) == sorted(f"nightly@{number}" for number in range(30))
    assert len(ledgers.open().firings(limit=100)) == 30


def test_threads_share_a_ledger_and_each_gets_its_own_reply(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    held = ledger.acquire("held", "me", 600)
    stale = held.model_copy(update={"token": 99})
    outcomes: dict[int, str] = {}

    def write(number: int) -> None:
        fence = stale if number % 3 == 0 else held
        try:
            ledger.apply([event(number), event(number)], fence=fence)
            outcomes[number] = "written"
        except LeaseError:
            outcomes[number] = "refused"

    threads = [threading.Thread(target=write, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {n: "refused" if n % 3 == 0 else "written" for n in range(30)}
    numbers = sorted(event.data["n"] for event in ledger.events())
    assert numbers == sorted(2 * [n for n in range(30) if n % 3])


def test_of_two_that_take_over_from_a_dead_owner_the_second_is_refused(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    dead = ledger.acquire("w", "dead", 600)
    first = ledger.acquire("w", "first", 600, dead=dead)
    with pytest.raises(LeaseError) as refused:
        ledger.acquire("w", "second", 600, dead=dead)
    assert refused.value.lease == ledger.lease("w") == first
    ledger.renew(first, 600)


def test_a_journal_writes_in_order_and_stops_with_its_lease(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    lease = ledger.acquire("w", "me", 60)
    journal = Journal(ledger.apply, lease)
    for number in range(500):
        journal.write(event(number))
    journal.flush()
    assert [event.data["n"] for event in ledger.events()] == list(range(500))
    ledger.acquire("w", "other", 60, dead=lease)
    journal.write(event(500))
    with pytest.raises(LeaseError):
        journal.flush()
    with pytest.raises(LeaseError):
        journal.write(event(501))
    journal.close()
    assert len(ledger.events()) == 500
