"""Kafka: each run fetches what a topic has got since the last one, whole or not at all.

The messages of a run are one segment of a log (see ``log``), which holds beside the declared
columns where each message comes from. A run goes on behind the newest offsets that are told by the
log itself, so what was fetched and where to go on can never disagree. A run that finds nothing is
told by a file beside the segments: events are complete up to it all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from mlops_ray.config.features import Kafka
from mlops_ray.errors import RequestError, SourceError
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.sources.batches import Batches
from mlops_ray.features.sources.events import (
    COMPLETE_UNTIL,
    FETCHED_AT,
    check_events,
    event_schema,
)
from mlops_ray.features.sources.log import newest_segment, write_segment
from mlops_ray.metadata.files import write_whole

KAFKA_TIME = "kafka_time"
_STATE = b"mlops-ray-kafka"
_IDLE = "idle.json"
_TIMEOUT_S = 10.0


def kafka_schema(kafka: Kafka) -> pa.Schema:
    """Return the schema of the raw rows.

    The declared columns; ``kafka_time``, the message's own timestamp; ``kafka_partition`` and
    ``kafka_offset``; ``fetched_at``, when the run began that fetched the message; ``received_at``,
    just after the beginning of the run before: earlier it was not here. That is null for those of
    the first run.
    """
    *declared, received = event_schema(kafka.columns)
    fields = [
        (KAFKA_TIME, INSTANT),
        ("kafka_partition", pa.int32()),
        ("kafka_offset", pa.int64()),
        (FETCHED_AT, INSTANT),
    ]
    return pa.schema([*declared, *(pa.field(*field) for field in fields), received])


def fetch(kafka: Kafka, folder: Path, where: str) -> int:
    """Append to the log in ``folder`` all messages up to the newest of now; return how many.

    Raises:
        SourceError: No answer from Kafka; it has dropped messages that were not fetched yet; or a
            message is not a JSON object with the declared columns.
    """
    number, state = _state(folder)
    before_us = state["fetched_us"]
    # The clock may have been set back; the runs must stay in order.
    now_us = max(time.time_ns() // 1000, (before_us or 0) + 1)
    spans = _spans(kafka, {int(p): at for p, at in state["offsets"].items()}, where)
    after = {"offsets": {p: span.stop for p, span in spans.items()}, "fetched_us": now_us}
    if not any(spans.values()):
        write_whole(folder / _IDLE, json.dumps(after).encode())
        return 0
    schema = kafka_schema(kafka).with_metadata({_STATE: json.dumps(after).encode()})
    flow = (
        _events(kafka, batch, schema, (before_us, now_us), where)
        for batch in _read(kafka, spans, where)
        if batch.num_rows
    )
    return write_segment(folder, number + 1, Batches(schema, flow))


def fetched_schema(kafka: Kafka, folder: Path) -> pa.Schema:
    """Return the schema of the raw rows, which tells up to when the log holds all messages."""
    fetched_us = _state(folder)[1]["fetched_us"]
    if fetched_us is None:
        return kafka_schema(kafka)
    return kafka_schema(kafka).with_metadata({COMPLETE_UNTIL: str(fetched_us).encode()})


def _state(folder: Path) -> tuple[int, dict[str, Any]]:
    """Return the newest segment's number and what the last run left, whether it found any or not."""
    number, newest = newest_segment(folder)
    states: list[dict[str, Any]] = [{"offsets": {}, "fetched_us": None}]
    if newest is not None:
        states.append(json.loads(newest.schema.metadata[_STATE]))
    idle = folder / _IDLE
    if idle.exists():
        states.append(json.loads(idle.read_bytes()))
    return number, max(states, key=lambda state: state["fetched_us"] or 0)


def _spans(kafka: Kafka, fetched: dict[int, int], where: str) -> dict[int, range]:
    """Return the offsets of each partition that are to be fetched now."""
    try:
        from confluent_kafka import Consumer, KafkaException, TopicPartition
    except ImportError as error:
        raise SourceError(
            "Kafka is read with confluent-kafka, which is not installed",
            where=f"{where}.kafka",
            fix="pip install 'mlops-ray[kafka]'",
        ) from error
    settings = {"group.id": "mlops-ray", "enable.auto.commit": False} | kafka.options
    consumer = Consumer(settings | {"bootstrap.servers": kafka.servers})
    try:
        topic = consumer.list_topics(kafka.topic, timeout=_TIMEOUT_S).topics[kafka.topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        spans = {}
        for partition in sorted(topic.partitions):
            place = TopicPartition(kafka.topic, partition)
            low, high = consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S)
            start = fetched.get(partition, low)
            if not low <= start <= high:
                raise _dropped(kafka, partition, start, (low, high), where)
            spans[partition] = range(start, high)
        return spans
    except KafkaException as error:
        raise _unreadable(kafka, error, where) from error
    finally:
        consumer.close()


def _read(kafka: Kafka, spans: dict[int, range], where: str) -> Iterator[pa.Table]:
    """Return the messages, partition by partition in order of their offsets."""
    import ray.data

    try:
        dataset = ray.data.read_kafka(
            kafka.topic,
            bootstrap_servers=kafka.servers.split(","),
            start_offset={kafka.topic: {p: span.start for p, span in spans.items()}},
            end_offset={kafka.topic: {p: span.stop for p, span in spans.items()}},
            consumer_config=dict(kafka.options),
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except Exception as error:
        raise _unreadable(kafka, error, where) from error


def _events(
    kafka: Kafka,
    messages: pa.Table,
    schema: pa.Schema,
    runs_us: tuple[int | None, int],
    where: str,
) -> pa.RecordBatch:
    """Return messages as rows of the log; of their fields, those that are declared."""
    rows = []
    for number, value in enumerate(messages["value"].to_pylist()):
        try:
            content = orjson.loads(value)
            rows.append({name: content.get(name) for name in kafka.columns})
        except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
            raise _unfit(kafka, messages, number, "is not a JSON object", where) from error
    try:
        declared = check_events(kafka.columns, rows)
    except RequestError as error:
        raise _unfit(kafka, messages, error.row or 0, error.what, where) from error
    # Kafka tells milliseconds; below zero there is no timestamp.
    told = messages["timestamp"].to_numpy()
    sent = pa.array(told * 1000, mask=told < 0).cast(INSTANT)
    before_us, now_us = runs_us
    received_us = None if before_us is None else before_us + 1
    extra = [sent, messages["partition"], messages["offset"]]
    extra += [
        pa.repeat(pa.scalar(at, pa.int64()), len(rows)).cast(INSTANT)
        for at in (now_us, received_us)
    ]
    columns = [*declared.columns, *extra]
    return pa.table(columns, schema=schema).combine_chunks().to_batches()[0]


def _unfit(kafka: Kafka, messages: pa.Table, row: int, what: str, where: str) -> SourceError:
    partition, offset = (messages[name][row].as_py() for name in ("partition", "offset"))
    return SourceError(
        f"a message of topic {kafka.topic!r} cannot be used: {what}",
        where=f"{where}.kafka",
        why=f"partition {partition}, offset {offset}; nothing of this run was stored",
        fix="declare the columns as the messages have them, or as strings and convert them in the "
        "clean function",
    )


def _dropped(
    kafka: Kafka, partition: int, start: int, held: tuple[int, int], where: str
) -> SourceError:
    return SourceError(
        f"topic {kafka.topic!r} does not hold what is to be fetched next",
        where=f"{where}.kafka",
        why=f"partition {partition} holds offsets {held[0]} to {held[1]}, next is {start}: it was "
        "made anew, or messages were dropped before they were fetched",
        fix="keep messages for longer than the time between runs; to start over, give the source a "
        "new name",
    )


def _unreadable(kafka: Kafka, error: Exception, where: str) -> SourceError:
    return SourceError(
        f"topic {kafka.topic!r} cannot be read",
        where=f"{where}.kafka",
        why=f"{type(error).__name__}: {error}",
        fix=f"check that {kafka.servers} answers, and the options",
    )
