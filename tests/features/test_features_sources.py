from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from mlops_ray.config.features import Source
from mlops_ray.errors import MlopsRayError, SchemaError, SourceError
from mlops_ray.features.sources import clean_source, read_source

TABLE = pa.table({"n": [1, 2], "at": pa.array([0, 90], pa.timestamp("s")), "day": ["a", "b"]})
UTC_US = pa.timestamp("us", tz="UTC")


def source(**content: object) -> Source:
    return Source.model_validate({"available_at": "at"} | content)


@pytest.mark.usefixtures("shop_project")
def test_a_function_with_its_arguments() -> None:
    table = read_source(source(read="shop_project.read_two", args={"rows": 3}))
    assert table["n"].to_pylist() == [0, 1, 2]
    assert table.schema.field("at").type == UTC_US


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "arrow"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_files(tmp_path: Path, kind: str, as_folder: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / f"part.{kind}"
    if kind == "parquet":
        pq.write_table(TABLE, file)
    elif kind == "csv":
        csv.write_csv(TABLE, file)
    elif kind == "arrow":
        with pa.ipc.new_file(file, TABLE.schema) as writer:
            writer.write_table(TABLE)
    else:
        file.write_text(
            '{"n": 1, "at": "1970-01-01 00:00:00"}\n{"n": 2, "at": "1970-01-01 00:01:30"}\n'
        )
    (folder / ".hidden").write_text("not data")
    table = read_source(source(path=str(folder if as_folder else file)))
    assert table["n"].to_pylist() == [1, 2]
    assert table.schema.field("at").type == UTC_US
    assert table["at"].to_pylist()[1] == datetime(1970, 1, 1, 0, 1, 30, tzinfo=UTC)


def test_several_files_come_in_order_of_their_names(tmp_path: Path) -> None:
    for name, number in (("b", 2), ("a", 1), ("c", 3)):
        pq.write_table(pa.table({"n": [number]}), tmp_path / f"{name}.parquet")
    table = read_source(source(path=str(tmp_path / "*.parquet")))
    assert table["n"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_timestamps_become_utc_microseconds(tmp_path: Path, unit: str, zone: str | None) -> None:
    moments = pa.array([-1, 1_700_000_000], pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    with pa.ipc.new_file(tmp_path / "t.arrow", pa.schema([("at", moments.type)])) as writer:
        writer.write_table(pa.table({"at": moments}))
    table = read_source(source(path=str(tmp_path / "t.arrow")))
    assert table["at"].cast(pa.int64()).to_pylist() == [-1_000_000, 1_700_000_000_000_000]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file at .*gone\.csv[\s\S]*fix:"):
        read_source(source(path=str(tmp_path / "gone.csv")), "features.sources.s")


def test_files_of_unknown_or_mixed_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(SourceError, match=r"cannot tell the format[\s\S]*\.xls"):
        read_source(source(path=str(tmp_path)))


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("this is no parquet")
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        read_source(source(path=str(tmp_path / "a.parquet")))


@pytest.mark.usefixtures("shop_project")
def test_functions_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(MlopsRayError, match=r"'shop_project' has no 'read_tow'[\s\S]*read_two"):
        read_source(source(read="shop_project.read_tow"))
    with pytest.raises(MlopsRayError, match="no module 'shop_projekt'"):
        read_source(source(read="shop_projekt.read_two"))
    with pytest.raises(SourceError, match="returned list, not a pyarrow"):
        read_source(source(read="shop_project.no_table"))
    with pytest.raises(SourceError, match=r"read_two failed[\s\S]*TypeError"):
        read_source(source(read="shop_project.read_two", args={"lines": 3}))


@pytest.mark.usefixtures("shop_project")
def test_clean() -> None:
    dropped = clean_source(source(path="x", clean="shop_project.drop_first"), TABLE)
    assert dropped["n"].to_pylist() == [2]
    assert clean_source(source(path="x"), TABLE) is TABLE
    with pytest.raises(SourceError, match=r"fails failed[\s\S]*KeyError: 'price'"):
        clean_source(source(path="x", clean="shop_project.fails"), TABLE)
    with pytest.raises(SchemaError, match="no column 'seen'"):
        clean_source(source(path="x", available_at="seen"), TABLE)
    with pytest.raises(SchemaError, match="'day' has the wrong type: expected timestamp"):
        clean_source(source(path="x", available_at="day"), TABLE)
