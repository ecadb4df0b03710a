"""Kafka: every message comes in once, whatever stands between two runs."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from mlops_ray.config.features import Features, Source
from mlops_ray.errors import SourceError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources import clean_source, extract_source, log, open_source
from mlops_ray.features.tables import read_tables

COLUMNS = {"shop": "string", "amount": "float", "sent": "timestamp"}


class Topic:
    """A topic of librdkafka's own mock broker, which lives in this process."""

    def __init__(self, producer: Any, name: str) -> None:
        self._producer = producer
        self.name = name
        brokers = producer.list_topics(timeout=10).brokers.values()
        self.servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def send(self, *messages: Any, partition: int = -1) -> None:
        for message in messages:
            value = message if isinstance(message, bytes) else json.dumps(message).encode()
            self._producer.produce(self.name, value, partition=partition)
        assert self._producer.flush(10) == 0

    def source(self, **more: Any) -> dict[str, Any]:
        kafka = {"servers": self.servers, "topic": self.name, "columns": COLUMNS}
        return {"kafka": kafka, "available_at": "kafka_time"} | more


@pytest.fixture(scope="module")
def producer() -> Any:
    from confluent_kafka import Producer

    return Producer({"test.mock.num.brokers": 1, "bootstrap.servers": ""})


@pytest.fixture
def topic(producer: Any, request: pytest.FixtureRequest) -> Topic:
    return Topic(producer, request.node.name.replace("[", "-").replace("]", ""))


def event(number: int) -> dict[str, Any]:
    sent = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    return {"shop": f"s{number % 3}", "amount": number, "sent": sent.isoformat(), "other": [1]}


def fetched(topic: Topic, folder: Path) -> pa.Table:
    return open_source(Source.model_validate(topic.source()), folder).read_all()


def test_each_run_takes_up_where_the_last_one_ended(
    ray_cluster: Any, topic: Topic, tmp_path: Path
) -> None:
    for partition in range(2):
        topic.send(*(event(n) for n in range(partition, 20, 2)), partition=partition)
    first = fetched(topic, tmp_path)
    assert sorted(first["amount"].to_pylist()) == [float(n) for n in range(20)]
    assert first["received_at"].null_count == 20
    assert first.schema.field("sent").type == pa.timestamp("us", tz="UTC")
    assert fetched(topic, tmp_path).equals(first)
    topic.send(*(event(n) for n in range(20, 25)), partition=1)
    second = fetched(topic, tmp_path)
    assert second.slice(0, 20).equals(first)
    assert second["amount"].to_pylist()[20:] == [20.0, 21.0, 22.0, 23.0, 24.0]
    # They were not here when the first run began: nothing that was made then could know them.
    late = second.slice(20)
    assert min(late["received_at"].to_pylist()) > max(first["fetched_at"].to_pylist())


def test_a_run_that_is_cut_short_leaves_nothing_behind(
    ray_cluster: Any, topic: Topic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic.send(*(event(n) for n in range(5)))
    before = fetched(topic, tmp_path)
    topic.send(*(event(n) for n in range(5, 9)))
    with monkeypatch.context() as patch:
        # The last moment at which a kill can take back a run.
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetched(topic, tmp_path)
    assert log.read_log(tmp_path, before.schema).read_all().equals(before)
    assert sorted(fetched(topic, tmp_path)["amount"].to_pylist()) == [float(n) for n in range(9)]


@pytest.mark.parametrize("message", [b"no json", b"[1]", {"amount": "7"}, b""])
def test_a_message_that_cannot_be_used_is_named(
    ray_cluster: Any, topic: Topic, tmp_path: Path, message: Any
) -> None:
    topic.send(event(0), message, partition=0)
    with pytest.raises(SourceError, match=r"cannot be used[\s\S]*partition 0, offset 1"):
        fetched(topic, tmp_path)


def test_no_kafka(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_ray.features.sources.kafka._TIMEOUT_S", 0.3)
    kafka = {
        "servers": "127.0.0.1:1",
        "topic": "t",
        "columns": COLUMNS,
        "options": {"log_level": 0},
    }
    with pytest.raises(SourceError, match=r"'t' cannot be read[\s\S]*127\.0\.0\.1:1"):
        open_source(Source(kafka=kafka, available_at="kafka_time"), tmp_path)


def test_a_topic_that_was_made_anew_is_an_error(
    ray_cluster: Any, topic: Topic, tmp_path: Path, producer: Any
) -> None:
    topic.send(*(event(n) for n in range(5)), partition=0)
    fetched(topic, tmp_path)
    other = Topic(producer, f"{topic.name}-anew")
    other.send(event(0), partition=0)
    with pytest.raises(SourceError, match="does not hold what is to be fetched next"):
        fetched(other, tmp_path)


def declare(topic: Topic, **source: Any) -> Features:
    view = {"entity": "shop", "source": "sales", "event_time": "sent"}
    return Features.model_validate(
        {
            "sources": {"sales": topic.source(**source)},
            "entities": {"shop": {"keys": {"shop": "string"}}},
            "views": {
                "sale": view | {"columns": ["amount"]},
                "sales": view
                | {"every": "1h", "windows": ["1d"], "aggregates": {"number": {"by": "count"}}},
            },
            "services": {},
            "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "sales"),
        }
    )


def test_late_messages_are_not_lost_behind_the_watermark(
    ray_cluster: Any, topic: Topic, tmp_path: Path
) -> None:
    features = declare(topic)
    offline = OfflineStore(tmp_path / "offline", features)
    online = open_online(features, tmp_path / "online", "shop")
    sent = 0
    for run, count in enumerate((30, 0, 12, 5)):
        topic.send(*(event(n) for n in range(sent, sent + count)))
        sent += count
        raw, clean = tmp_path / f"raw{run}", tmp_path / f"clean{run}"
        extract_source(features, "sales", raw, tmp_path / "events")
        clean_source(features, "sales", raw, clean)
        pipeline = FeaturePipeline(features, clean, offline, online)
        # Far beyond what was fetched: messages that come later must count all the same.
        pipeline.advance(datetime.now(UTC) + timedelta(days=1))
        assert sorted(offline.read("sale")["amount"].to_pylist()) == [float(n) for n in range(sent)]
        assert len(read_tables(clean)["sales"]) == sent
        time.sleep(0.01)


def test_a_silent_topic_still_ends_its_last_window(
    ray_cluster: Any, topic: Topic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = declare(topic, available_at="sent", clean="features.cleaners.first_row")
    offline = OfflineStore(tmp_path / "offline", features)
    online = open_online(features, tmp_path / "online", "shop")
    start = int(datetime(2024, 1, 1, 0, 30, tzinfo=UTC).timestamp())
    topic.send(event(60), partition=0)
    rows = []
    # A run that finds a message, one whose messages the clean function drops, one that finds none.
    for run, minutes in enumerate((0, 10, 60)):
        clock = SimpleNamespace(time_ns=lambda at=start + minutes * 60: at * 1_000_000_000)
        monkeypatch.setattr("mlops_ray.features.sources.kafka.time", clock)
        if run == 1:
            topic.send(event(61), partition=0)
        raw, clean = tmp_path / f"raw{run}", tmp_path / f"clean{run}"
        extract_source(features, "sales", raw, tmp_path / "events")
        clean_source(features, "sales", raw, clean)
        pipeline = FeaturePipeline(features, clean, offline, online)
        pipeline.advance(None)
        assert pipeline.done == datetime.fromtimestamp(start + minutes * 60, UTC)
        rows.append(offline.read("sales").num_rows)
    assert rows == [0, 0, 1]


def test_messages_after_a_run_that_found_none_count_as_received_since(
    ray_cluster: Any, topic: Topic, tmp_path: Path
) -> None:
    topic.send(event(0), partition=0)
    first = fetched(topic, tmp_path)
    assert fetched(topic, tmp_path).equals(first)
    told = int(json.loads((tmp_path / "idle.json").read_bytes())["fetched_us"])
    topic.send(event(1), partition=0)
    received = fetched(topic, tmp_path)["received_at"].cast(pa.int64()).to_pylist()
    assert received == [None, told + 1]


def test_received_at_does_not_say_when_a_message_was_available() -> None:
    kafka = {"servers": "x", "topic": "t", "columns": COLUMNS}
    with pytest.raises(ValidationError, match="may not be received_at"):
        Source.model_validate({"kafka": kafka, "available_at": "received_at"})


def test_received_at_does_not_say_when_a_message_happened() -> None:
    topic = {"servers": "localhost:9092", "topic": "t", "columns": {"user": "string"}}
    view = {"entity": "user", "source": "s", "event_time": "received_at", "columns": ["a"]}
    with pytest.raises(ValidationError, match=r"views\.v\.event_time may not be received_at"):
        Features.model_validate(
            {
                "sources": {"s": {"kafka": topic, "available_at": "kafka_time"}},
                "entities": {"user": {"keys": {"user": "string"}}},
                "views": {"v": view},
                "services": {},
                "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "s"),
            }
        )
