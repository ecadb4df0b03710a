"""Sources of every kind give the same rows, stream, and say what is wrong with them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from mlops_ray.config.features import Features, Source
from mlops_ray.errors import MlopsRayError, SchemaError, SourceError
from mlops_ray.features.sources import (
    clean_source,
    clean_table,
    cleaning,
    extract_source,
    open_source,
)
from mlops_ray.features.sources.batches import Batches
from mlops_ray.features.tables import read_tables, write_tables

TABLE = pa.table({"n": [1, 2], "at": pa.array([0, 90], pa.timestamp("s")), "day": ["a", "b"]})
UTC_US = pa.timestamp("us", tz="UTC")
NOWHERE = Path("no events")


def source(**content: object) -> Source:
    return Source.model_validate({"available_at": "at"} | content)


def read(given: Source, where: str = "source") -> pa.Table:
    return open_source(given, NOWHERE, where).read_all()


@pytest.mark.usefixtures("shop_project")
def test_a_function_with_its_arguments() -> None:
    table = read(source(read="shop_project.read_two", args={"rows": 3}))
    assert table["n"].to_pylist() == [0, 1, 2]
    assert table.schema.field("at").type == UTC_US


@pytest.mark.usefixtures("shop_project")
def test_a_pandas_frame() -> None:
    table = read(source(read="shop_project.read_frame"))
    assert table["n"].to_pylist() == [1, 2]
    assert table["kind"].to_pylist() == ["x", "y"]
    assert not pa.types.is_dictionary(table.schema.field("kind").type)
    assert table["at"].to_pylist()[0] == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.usefixtures("shop_project")
def test_a_ray_dataset_streams_in_order(ray_cluster: Any) -> None:
    found = open_source(source(read="shop_project.read_dataset"), NOWHERE)
    batches = [batch["n"].to_pylist() for batch in found.batches]
    assert list(chain.from_iterable(batches)) == list(range(1000))
    assert len(batches) > 1


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
    for path in (str(folder if as_folder else file), f"file://{folder if as_folder else file}"):
        table = read(source(path=path))
        assert table["n"].to_pylist() == [1, 2]
        assert table.schema.field("at").type == UTC_US
        assert table["at"].to_pylist()[1] == datetime(1970, 1, 1, 0, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_several_files_come_in_order_of_their_names(tmp_path: Path, scheme: str) -> None:
    for name, number in (("b", 2), ("a", 1), ("c", 3)):
        pq.write_table(pa.table({"n": [number]}), tmp_path / f"{name}.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    table = read(source(path=f"{scheme}{tmp_path}/*.parquet"))
    assert table["n"].to_pylist() == [1, 2, 3]


def test_a_column_that_only_later_files_have(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2], "more": ["x"]}), tmp_path / "b.parquet")
    table = read(source(path=str(tmp_path)))
    assert table.to_pylist() == [{"n": 1, "more": None}, {"n": 2, "more": "x"}]
    pq.write_table(pa.table({"n": ["three"]}), tmp_path / "c.parquet")
    with pytest.raises(SourceError, match=r"cannot be read as parquet[\s\S]*int64"):
        read(source(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_column_that_only_later_text_files_have(tmp_path: Path, kind: str) -> None:
    texts = {
        "csv": ("n,code\n1,\n", "n,code,more\n2,A1,x\n", "n,code\n3,7\n"),
        "json": (
            '{"n": 1, "code": null}\n',
            '{"n": 2, "code": "A1", "more": "x"}\n',
            '{"n": 3, "code": "7"}\n',
        ),
    }
    for number, text in enumerate(texts[kind]):
        (tmp_path / f"{number}.{kind}").write_text(text)
    table = read(source(path=str(tmp_path)))
    assert table["n"].to_pylist() == [1, 2, 3]
    assert table["code"].to_pylist()[1:] == ["A1", "7"]
    assert table["more"].to_pylist() == [None, "x", None]


def test_csv_takes_options(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n;code\n1;007\n-;008\n")
    options = {"delimiter": ";", "null_values": ["-"], "types": {"code": "string"}}
    table = read(source(path=str(tmp_path / "a.csv"), options=options))
    assert table.to_pylist() == [{"n": 1, "code": "007"}, {"n": None, "code": "008"}]


def test_a_delta_table_at_a_version(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    write_deltalake(str(tmp_path / "t"), TABLE.slice(0, 1))
    write_deltalake(str(tmp_path / "t"), TABLE, mode="overwrite")
    # The folder also holds the files of version 0: it must not be read as plain Parquet.
    assert read(source(path=str(tmp_path / "t")))["n"].to_pylist() == [1, 2]
    old = source(path=str(tmp_path / "t"), format="delta", options={"version": 0})
    assert read(old)["n"].to_pylist() == [1]
    gone = source(path=str(tmp_path / "t"), format="delta", options={"version": 9})
    with pytest.raises(SourceError, match=r"Delta table at .* cannot be read"):
        read(gone)


def test_an_iceberg_table_at_a_snapshot(tmp_path: Path) -> None:
    from pyiceberg.catalog import load_catalog

    catalog = {"type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": str(tmp_path)}
    writer = load_catalog("lake", **catalog)
    writer.create_namespace("shop")
    rows = TABLE.set_column(1, "at", TABLE["at"].cast(UTC_US))
    table = writer.create_table("shop.visits", schema=rows.schema)
    table.append(rows.slice(0, 1))
    first = table.current_snapshot()
    assert first is not None
    table.append(rows.slice(1))
    options: dict[str, Any] = {"catalog": "lake", **catalog}
    found = read(source(path="shop.visits", format="iceberg", options=options))
    assert sorted(found["n"].to_pylist()) == [1, 2]
    options["snapshot_id"] = first.snapshot_id
    found = read(source(path="shop.visits", format="iceberg", options=options))
    assert found["n"].to_pylist() == [1]
    with pytest.raises(SourceError, match=r"shop\.gone cannot be read"):
        read(source(path="shop.gone", format="iceberg", options=options))


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """The address of a server that speaks S3, with an empty bucket ``lake``."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="k",
        aws_secret_access_key="s",
    ).create_bucket(Bucket="lake")
    yield address
    server.stop()


def test_an_object_store(object_store: str) -> None:
    from pyarrow import fs

    options = {
        "endpoint_override": object_store,
        "access_key": "k",
        "secret_key": "s",
        "region": "us-east-1",
    }
    filesystem = fs.S3FileSystem(**options)
    for name, row in (("b", 1), ("a", 0)):
        with filesystem.open_output_stream(f"lake/visits/{name}.parquet") as sink:
            pq.write_table(TABLE.slice(row, 1), sink)
    for path in ("s3://lake/visits", "s3://lake/visits/*.parquet", "s3://lake/visits/a.parquet"):
        found = read(source(path=path, options=options))["n"].to_pylist()
        assert found == ([1] if path.endswith("a.parquet") else [1, 2])
    with pytest.raises(SourceError, match="no file at s3://lake/nothing"):
        read(source(path="s3://lake/nothing", options=options))


def test_sql_streams_and_learns_types_late(tmp_path: Path, features: Any) -> None:
    database = sqlite3.connect(tmp_path / "shop.db")
    database.execute("create table visits (n integer, word text, at text)")
    rows = [(n, None if n < 7 else f"w{n}", "2024-01-01 00:00:00") for n in range(10)]
    database.executemany("insert into visits values (?, ?, ?)", rows)
    database.commit()
    sql = {
        "url": f"sqlite:///{tmp_path}/shop.db",
        "query": "select n, word from visits order by n",
        "batch_rows": 3,
    }
    declared = features(rows={"sql": sql, "available_at": "at"})
    assert extract_source(declared, "rows", tmp_path / "raw", NOWHERE) == 10
    table = read_tables(tmp_path / "raw")["rows"]
    assert table["n"].to_pylist() == list(range(10))
    assert table["word"].to_pylist() == [None] * 7 + ["w7", "w8", "w9"]
    whole = features(rows={"sql": sql | {"batch_rows": 100}, "available_at": "at"})
    extract_source(whole, "rows", tmp_path / "whole", NOWHERE)
    assert (tmp_path / "raw/rows.arrow").read_bytes() == (
        tmp_path / "whole/rows.arrow"
    ).read_bytes()


def test_sql_errors_hide_the_password(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/gone/secret77.db"
    with pytest.raises(SourceError, match=r"the query failed[\s\S]*unable to open"):
        read(source(sql={"url": url, "query": "select 1"}))
    with pytest.raises(SourceError, match=r"the query failed[\s\S]*driver is installed") as caught:
        read(source(sql={"url": "nodatabase://me:secret77@h/d", "query": "select 1"}))
    assert "secret77" not in str(caught.value)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_timestamps_become_utc_microseconds(tmp_path: Path, unit: str, zone: str | None) -> None:
    moments = pa.array([-1, 1_700_000_000], pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    with pa.ipc.new_file(tmp_path / "t.arrow", pa.schema([("at", moments.type)])) as writer:
        writer.write_table(pa.table({"at": moments}))
    table = read(source(path=str(tmp_path / "t.arrow")))
    assert table["at"].cast(pa.int64()).to_pylist() == [-1_000_000, 1_700_000_000_000_000]


def test_times_are_cut_off_towards_the_past_and_never_wrap() -> None:
    fine = pa.array([-1, -1500, 1500], pa.int64()).cast(pa.timestamp("ns"))
    table = pa.table({"at": fine, "coded": fine.dictionary_encode()})
    for column in Batches.of(table).normalised().read_all().columns:
        assert column.type == UTC_US
        assert column.cast(pa.int64()).to_pylist() == [-1, -2, 1]
    far = pa.table({"at": pa.array([2**60], pa.timestamp("s"))})
    with pytest.raises(SchemaError, match="a time is out of range"):
        Batches.of(far).normalised().read_all()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file at .*gone\.csv[\s\S]*fix:"):
        read(source(path=str(tmp_path / "gone.csv")), "features.sources.s")


def test_files_of_unknown_or_mixed_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(SourceError, match=r"cannot tell the format[\s\S]*\.xls"):
        read(source(path=str(tmp_path)))


def test_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("this is no parquet")
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        read(source(path=str(tmp_path / "a.parquet")))


@pytest.mark.usefixtures("shop_project")
def test_functions_that_do_not_do() -> None:
    with pytest.raises(MlopsRayError, match=r"'shop_project' has no 'read_tow'[\s\S]*read_two"):
        read(source(read="shop_project.read_tow"))
    with pytest.raises(MlopsRayError, match="no module 'shop_projekt'"):
        read(source(read="shop_projekt.read_two"))
    with pytest.raises(SourceError, match="returned list, not a pyarrow"):
        read(source(read="shop_project.no_table"))
    with pytest.raises(SourceError, match=r"read_two failed[\s\S]*TypeError"):
        read(source(read="shop_project.read_two", args={"lines": 3}))


@pytest.mark.usefixtures("shop_project")
def test_clean() -> None:
    dropped = clean_table(source(path="x", clean="shop_project.drop_first"), TABLE).read_all()
    assert dropped["n"].to_pylist() == [2]
    assert clean_table(source(path="x"), TABLE).read_all()["n"].to_pylist() == [1, 2]
    with pytest.raises(SourceError, match=r"fails failed[\s\S]*KeyError: 'price'"):
        clean_table(source(path="x", clean="shop_project.fails"), TABLE)
    with pytest.raises(SchemaError, match="no column 'seen'"):
        clean_table(source(path="x", available_at="seen"), TABLE)
    with pytest.raises(SchemaError, match="'day' has the wrong type: expected timestamp"):
        clean_table(source(path="x", available_at="day"), TABLE)


@pytest.fixture
def features(shop: SimpleNamespace) -> Any:
    """Make declarations out of sources alone."""

    def build(**sources: dict[str, Any]) -> Features:
        return shop.features.model_copy(
            update={"sources": {name: Source.model_validate(s) for name, s in sources.items()}}
        )

    return build


@pytest.mark.usefixtures("shop_project")
def test_clean_by_batch_is_clean_by_table(tmp_path: Path, features: Any) -> None:
    rows = 300_000
    raw = pa.table({"n": list(range(rows)), "at": pa.array([0] * rows, UTC_US)})
    write_tables(tmp_path / "raw", {"batch": raw, "table": raw})
    common = {"path": "x", "available_at": "at", "clean": "shop_project.keep_even"}
    declared = features(
        batch=common | {"clean_by": "batch", "expectations": [{"column": "n", "maximum": 10}]},
        table=common,
    )
    for name in ("batch", "table"):
        cleaned = clean_source(declared, name, tmp_path / "raw", tmp_path / "clean")
        assert (cleaned.rows, cleaned.dropped) == (rows // 2, rows // 2)
        assert [result.passed for result in cleaned.results] == [False] * (name == "batch")
    files = [(tmp_path / "clean" / f"{name}.arrow").read_bytes() for name in ("batch", "table")]
    assert files[0] == files[1]


def test_cleaning_on_ray_data_gives_the_same_bytes(
    ray_cluster: Any, tmp_path: Path, features: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1_200_000
    raw = pa.table({"n": range(rows), "at": pa.array([0] * rows, UTC_US)})
    write_tables(tmp_path / "raw", {"rows": raw})
    by_batch = {"path": "x", "available_at": "at", "clean_by": "batch"}
    declared = features(rows=by_batch | {"clean": "features.cleaners.keep_even"})
    clean_source(declared, "rows", tmp_path / "raw", tmp_path / "here")
    monkeypatch.setattr(cleaning, "WORTH_S", 0.0)
    made = clean_source(declared, "rows", tmp_path / "raw", tmp_path / "ray")
    assert made.rows == rows // 2
    files = [(tmp_path / place / "rows.arrow").read_bytes() for place in ("ray", "here")]
    assert files[0] == files[1]
    broken = features(rows=by_batch | {"clean": "features.cleaners.fails_late"})
    with pytest.raises(SourceError, match=r"fails_late failed(.|\n)*KeyError: 'price'"):
        clean_source(broken, "rows", tmp_path / "raw", tmp_path / "broken")


STREAMED = """
import sys
from pathlib import Path
import pyarrow as pa
from mlops_ray.config.features import Source
from mlops_ray.features.sources import open_source
from mlops_ray.features.sources.batches import Batches
from mlops_ray.features.sources.cleaning import clean_slices
from mlops_ray.features.tables import write_table

folder = Path(sys.argv[1])
source = Source(
    path=str(folder / "raw"), available_at="at", clean="shop_project.keep_even", clean_by="batch"
)
raw = open_source(source, folder)
rows = write_table(folder, "raw copy", raw.batches, raw.schema)
clean = Batches.from_first(clean_slices(source.clean, folder / "raw copy.arrow", "source"))
kept = write_table(folder, "clean", clean.batches, clean.schema)
print(rows, kept, pa.default_memory_pool().max_memory())
"""


@pytest.mark.usefixtures("shop_project")
def test_a_source_streams_in_a_fraction_of_its_size(tmp_path: Path) -> None:
    rows, files = 400_000, 24
    (tmp_path / "raw").mkdir()
    table = pa.table({name: pa.array(range(rows)) for name in ("n", "a", "b", "c")})
    table = table.append_column("at", pa.array([0] * rows, UTC_US))
    for number in range(files):
        pq.write_table(table, tmp_path / f"raw/{number:02d}.parquet", row_group_size=50_000)
    told = subprocess.run(
        [sys.executable, "-c", STREAMED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    read, kept, peak_bytes = map(int, told.stdout.split())
    assert (read, kept) == (rows * files, rows * files // 2)
    # What is in flight does not grow with the source: 70 to 230 MB here, more on a busy machine; held
    # whole, the raw and the cleaned rows would be 576 MB.
    assert peak_bytes < table.nbytes * files * 0.7
