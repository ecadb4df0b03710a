"""Frames on disk: whatever happens to a file, what is read was written, and what is whole is read."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.metadata import files
from mlops_ray.metadata.prediction_log.frames import (
    MAGIC,
    encode,
    file_head,
    read_frames,
    sealed,
)
from mlops_ray.metadata.prediction_log.layout import (
    LABELS,
    frames_after,
    replica_folder,
    segments,
    try_lock,
)
from mlops_ray.metadata.profile import Profile
from mlops_ray.serving.log.writer import SegmentWriter


def labels(*ids: str) -> pa.Table:
    rows = [{"id": i, "label": 1, "known_at": 0, "received": 0} for i in ids]
    return pa.Table.from_pylist(rows, schema=LABELS)


def frame(sequence: int) -> bytes:
    ids = [f"{sequence}-{number}" for number in range(sequence % 3 + 1)]
    return encode(sequence, None, None, labels(*ids), {})


def read(data: bytes, after: int = 0) -> list[tuple[int, list[str]]]:
    found = []
    for item in read_frames(io.BytesIO(data), after):
        assert item.labels is not None
        found.append((item.sequence, item.labels["id"].to_pylist()))
    return found


HEAD = file_head()
FRAMES = [sealed(frame(sequence), HEAD) for sequence in range(1, 7)]
WHOLE = HEAD + b"".join(FRAMES)
STARTS = np.cumsum([len(HEAD), *(len(data) for data in FRAMES)]).tolist()
EXPECTED = read(WHOLE)


def test_all_parts_come_back() -> None:
    profile = Profile({"x": np.array([1, 0, 2])}, 3)
    predictions = pa.table({"id": ["a"], "features": [{"x": 1.0}]})
    others = pa.table({"id": ["b"]})
    data = encode(7, predictions, others, labels("c"), {"digest": {"2024-03-01": profile}})
    (found,) = read_frames(io.BytesIO(HEAD + sealed(data, HEAD)))
    assert found.sequence == 7
    assert found.predictions is not None
    assert found.predictions.equals(predictions)
    assert found.others is not None
    assert found.others.equals(others)
    assert found.labels is not None
    assert found.labels.equals(labels("c"))
    assert found.counts == {"digest": {"2024-03-01": profile}}
    nothing = sealed(encode(1, None, None, None, {}), HEAD)
    (empty,) = read_frames(io.BytesIO(HEAD + nothing))
    assert (empty.predictions, empty.others, empty.labels, empty.counts) == (None, None, None, {})


def test_reading_begins_behind_a_sequence_number() -> None:
    assert [number for number, _ in EXPECTED] == [1, 2, 3, 4, 5, 6]
    assert read(WHOLE, after=4) == EXPECTED[4:]
    assert read(HEAD + FRAMES[1] + FRAMES[1] + FRAMES[0] + FRAMES[2]) == EXPECTED[1:3]


@settings(deadline=None)
@given(cut=st.integers(0, len(WHOLE)))
def test_a_torn_end_costs_no_whole_frame(cut: int) -> None:
    whole = sum(start <= cut for start in STARTS[1:])
    assert read(WHOLE[:cut]) == EXPECTED[:whole]


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_costs_only_the_frames_that_it_touches(data: st.DataObject) -> None:
    start = data.draw(st.integers(len(HEAD), len(WHOLE) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=600))
    damaged = bytearray(WHOLE)
    damaged[start : start + len(noise)] = noise[: len(WHOLE) - start]
    touched = {
        place
        for place in range(6)
        if bytes(damaged[STARTS[place] : STARTS[place + 1]]) != FRAMES[place]
    }
    assert read(bytes(damaged)) == [e for place, e in enumerate(EXPECTED) if place not in touched]


@settings(deadline=None, max_examples=200)
@given(
    start=st.integers(len(HEAD), len(WHOLE) - 1),
    length=st.integers(0, 700),
    noise=st.binary(max_size=100),
)
def test_lost_and_strange_bytes_cost_only_the_frames_that_they_touch(
    start: int, length: int, noise: bytes
) -> None:
    damaged = WHOLE[:start] + noise + WHOLE[start + length :]
    kept = [
        entry
        for place, entry in enumerate(EXPECTED)
        if STARTS[place + 1] <= start or STARTS[place] >= start + length
    ]
    found = read(damaged)
    assert [entry for entry in found if entry in kept] == kept
    assert all(entry in EXPECTED for entry in found)


@settings(deadline=None)
@given(noise=st.binary(max_size=2000))
def test_noise_holds_nothing(noise: bytes) -> None:
    assert read(noise) == []


def test_a_writer_begins_a_new_file_when_one_is_full_and_lets_go_of_it(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "r", 0.0)
    for number in range(1, 7):
        writer.append(number, frame(number))
    (found,) = segments(tmp_path).values()
    assert [segment.first for segment in found] == [1, 2, 3, 4, 5, 6]
    locked = []
    for segment in found:
        with segment.path.open("rb") as file:
            locked.append(not try_lock(file))
    assert locked == [False] * 5 + [True]
    writer.close()
    with found[-1].path.open("rb") as file:
        assert try_lock(file)
    assert [item.sequence for item in frames_after(found, 3)] == [4, 5, 6]


def test_a_failed_write_is_cut_off_and_the_next_one_is_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    writer = SegmentWriter(tmp_path, "r", 1e9)
    writer.append(1, frame(1))
    real, calls = os.write, 0

    def full(file: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "no space left on device")
        return real(file, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="no space"):
            writer.append(2, frame(2))
    (segment,) = segments(tmp_path)["r"]
    whole = segment.path.read_bytes()
    assert whole == whole[: len(HEAD)] + sealed(frame(1), whole[: len(HEAD)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: full(file, b""))
        calls = 1
        with pytest.raises(OSError, match="no space"):
            writer.append(2, frame(2))
    assert len(segments(tmp_path)["r"]) == 1
    writer.append(2, frame(2))
    assert [s.first for s in segments(tmp_path)["r"]] == [1, 2]
    assert not (replica_folder(tmp_path, "r") / ".draft").exists()
    writer.close()


@settings(deadline=None)
@given(cut=st.integers(0, 400), sequence=st.integers(2, 2**63))
def test_a_client_cannot_make_up_a_frame(cut: int, sequence: int) -> None:
    """What a payload holds is no frame, also where the payload is torn; it does not know the key."""
    other = file_head()
    inner = sealed(encode(sequence, None, None, labels("forged"), {}), other)
    payload = other + inner + inner
    length, checksum = struct.pack("<I", len(payload)), struct.pack("<I", zlib.crc32(payload))
    torn = MAGIC + length + struct.pack("<Q", 1) + checksum
    data = HEAD + sealed(torn + payload, HEAD)
    assert [f.sequence for f in read_frames(io.BytesIO(data[: len(data) - cut]))] == []


def test_lengths_that_do_not_add_up_are_damage() -> None:
    for payload in (b"", b"ABCDabcd", struct.pack("<4I", 1, 0, 0, 0), bytes(17)):
        checksum = zlib.crc32(payload)
        bad = struct.pack("<4sIQI", MAGIC, len(payload), 1, checksum) + payload
        assert read(HEAD + sealed(bad, HEAD) + FRAMES[1]) == EXPECTED[1:2]


def test_the_folders_of_a_new_replica_survive_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    SegmentWriter(tmp_path / "log", "r", 0.0).append(1, frame(1))
    assert synced == [tmp_path, tmp_path / "log", tmp_path / "log" / "replicas"]
