"""Batch scoring: what is scored, what is refused, and that all of it happens once."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from serving import batch_world, shop
from serving.batch_world import by_hand, fill_offline, inline, score, visits

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Graph, Serving
from mlops_ray.errors import DataError, MlopsRayError, SchemaError, ServingError, SourceError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.package import read
from mlops_ray.metadata.prediction_log.reading import read_predictions
from mlops_ray.metadata.stability import psi
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.serving.batch import scoring, worker
from mlops_ray.serving.batch.worker import PieceScorer

ROWS = 60


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("batch") / "home"
    fill_offline(Home(home))
    return home


@pytest.fixture
def batch_home(filled: Path, tmp_path: Path) -> Home:
    return Home(Path(shutil.copytree(filled, tmp_path / "home")))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are scored in this process, without Ray."""
    monkeypatch.setattr(scoring, "run_pieces", inline)


def place(table: pa.Table, folder: Path, *, groups: int = 10) -> Path:
    """Write rows as two Parquet files."""
    folder.mkdir()
    half = table.num_rows // 2 + 3
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=groups)
    pq.write_table(table.slice(half), folder / "b.parquet", row_group_size=groups)
    return folder


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def check_scores(scored: pa.Table, table: pa.Table, package: Path) -> None:
    expected = by_hand(table, package)
    np.testing.assert_allclose(scored["score"].to_numpy(), expected, atol=1e-6)
    assert scored["predicted_label"].to_pylist() == [int(value >= 0.5) for value in expected]
    assert set(scored["model_version"].to_pylist()) == {1}


def test_rows_are_scored_on_the_cluster_as_of_their_time(
    ray_cluster: Any, batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = visits(ROWS)
    source, output = place(table, tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    (output / "of-yesterday.parquet").write_bytes(b"")
    result = score(batch_home, packages[0], source, output, piece_rows=15)
    scored = pq.read_table(output)
    assert (result.rows, result.pieces, result.rejected) == (ROWS, 6, 0)
    assert scored.select(table.column_names).equals(table), "order and columns are the input's"
    check_scores(scored, table, packages[0])
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("piece_rows", [1, 7, 10, 33, 1000])
def test_pieces_cut_anyhow_give_the_same_rows(
    batch_home: Home, packages: list[Path], tmp_path: Path, piece_rows: int
) -> None:
    table = visits(ROWS)
    source = place(table, tmp_path / "in", groups=25)
    result = score(batch_home, packages[0], source, tmp_path / "out", piece_rows=piece_rows)
    scored = pq.read_table(tmp_path / "out")
    assert scored.select(table.column_names).equals(table)
    check_scores(scored, table, packages[0])
    assert sum(result.scores.counts) == ROWS
    assert result.scores.mean == pytest.approx(float(np.mean(scored["score"])), abs=1e-9)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "delta"])
def test_texts_that_repeat_are_checked_scored_and_written_as_texts(
    batch_home: Home, packages: list[Path], tmp_path: Path, kind: str
) -> None:
    rows = 10 * ROWS
    table, kept = visits(rows), [row for row in range(rows) if row != 5]
    customers = pa.array([None if row == 5 else "anna" for row in range(rows)], pa.string())
    flawed = table.set_column(1, "customer", customers)
    source, output = place(flawed, tmp_path / "in", groups=rows), tmp_path / f"out.{kind}"
    settings = {"output_format": kind, "max_rejected": 0.1, "batch_rows": 50}
    result = score(batch_home, packages[0], source, output, **settings)
    if kind == "parquet":
        scored = pq.read_table(output)
        assert scored.select(table.column_names).equals(table.take(kept))
        check_scores(scored, table.take(kept), packages[0])
    assert (result.rows, result.rejected) == (len(kept), 1)
    (told,) = pq.read_table(tmp_path / f"out.{kind}.rejected.parquet").to_pylist()
    assert json.loads(told["values"])["coupon"] is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["csv", "json", "delta", "parquet"])
def test_formats_go_in_and_out(
    batch_home: Home, packages: list[Path], tmp_path: Path, kind: str
) -> None:
    table = visits(ROWS)
    source = tmp_path / f"in.{'jsonl' if kind == 'json' else kind}"
    frame = pl.DataFrame(table)
    if kind == "csv":
        frame.write_csv(source, datetime_format="%Y-%m-%dT%H:%M:%S%z")
    elif kind == "json":
        rows = frame.with_columns(pl.col("at").dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
        rows.write_ndjson(source)
    elif kind == "delta":
        frame.write_delta(str(source))
    else:
        frame.write_parquet(source)
    for wanted in ("csv", "json", "delta", "parquet"):
        output = tmp_path / f"out-{wanted}"
        score(batch_home, packages[0], source, output, output_format=wanted, piece_rows=20)
        if wanted == "delta":
            found = pl.read_delta(str(output)).sort(pl.col("number").cast(pl.Int64))
        elif wanted == "csv":
            found = pl.read_csv(output / "*.csv", try_parse_dates=True)
        elif wanted == "json":
            parts = sorted(output.glob("*.jsonl"))
            found = pl.concat([pl.read_ndjson(part) for part in parts], how="diagonal_relaxed")
        else:
            found = pl.read_parquet(output / "*.parquet")
        assert found["number"].cast(pl.Int64).to_list() == list(range(ROWS))
        assert found["shop"].to_list() == table["shop"].to_pylist()
        np.testing.assert_allclose(found["score"], by_hand(table, packages[0]), atol=1e-6)


@pytest.mark.usefixtures("here")
def test_a_query_is_scored_into_a_table_once(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    import sqlalchemy as sa

    url = f"sqlite:///{tmp_path / 'shop.db'}"
    table, engine = visits(ROWS), sa.create_engine(url)
    pl.DataFrame(table).write_database("visits", engine, engine="sqlalchemy")
    settings = {"query": "select * from visits order by number", "table": "scored"}
    for _ in range(2):
        score(batch_home, packages[0], url, url, **settings, piece_rows=20)
    with engine.connect() as connection:
        rows = connection.execute(sa.text("select * from scored")).mappings().all()
        assert [row["number"] for row in rows] == list(range(ROWS)), "replaced, not added to"
        expected = by_hand(table, packages[0])
        np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-6)
    results = [
        score(batch_home, packages[0], url, url, append=True, **settings | {"table": "added"})
        for _ in range(2)
    ]
    with engine.connect() as connection:
        assert connection.execute(sa.text("select count(*) from added")).scalar_one() == ROWS
    assert [result.was_there for result in results] == [False, True]
    assert results[0].rows == results[1].rows == ROWS
    engine.dispose()


@pytest.mark.usefixtures("here")
def test_rows_of_a_query_whose_texts_repeat_are_checked_one_by_one(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    import sqlalchemy as sa

    url, rows = f"sqlite:///{tmp_path / 'shop.db'}", 5 * ROWS
    engine = sa.create_engine(url)
    # As SQLite has them: times without an offset, numbers as texts, one of which is none.
    amounts = pl.Series(["2.5"] * 5 + ["n/a"] + ["2.5"] * (rows - 6))
    table = pl.DataFrame(visits(rows)).with_columns(
        at=pl.lit(f"{shop.NOW:%Y-%m-%d %H:%M:%S}"), amount=amounts
    )
    table.write_database("visits", engine, engine="sqlalchemy")
    engine.dispose()
    settings = {"query": "select * from visits order by number", "batch_rows": 50}
    output = tmp_path / "out.parquet"
    result = score(batch_home, packages[0], url, output, max_rejected=0.1, **settings)
    assert (result.rows, result.rejected) == (rows - 1, 1)
    (told,) = pq.read_table(tmp_path / "out.parquet.rejected.parquet").to_pylist()
    assert (told["row"], told["field"]) == (5, "amount")


@pytest.mark.usefixtures("here")
def test_delta_is_added_to_once_for_each_input(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    source = place(visits(ROWS), tmp_path / "in")
    how = {"output_format": "delta", "append": True, "piece_rows": 20}
    first, again = (
        score(batch_home, packages[0], source, tmp_path / "out", **how) for _ in range(2)
    )
    assert (first.was_there, again.was_there, again.rows) == (False, True, ROWS)
    pq.write_table(visits(5), source / "c.parquet")
    score(batch_home, packages[0], source, tmp_path / "out", **how)
    counted = pl.read_delta(str(tmp_path / "out")).group_by("number").len().sort("number")
    assert counted["len"].to_list() == [3] * 5 + [2] * (ROWS - 5)
    score(batch_home, packages[0], source, tmp_path / "out", output_format="delta")
    assert len(pl.read_delta(str(tmp_path / "out"))) == ROWS + 5, "without append it is replaced"
    score(batch_home, packages[0], source, tmp_path / "out", **how)
    assert len(pl.read_delta(str(tmp_path / "out"))) == 2 * (ROWS + 5), "what was added is gone"


@pytest.mark.usefixtures("here")
def test_rows_that_do_not_fit_go_to_a_table_of_their_own(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    lines = pl.DataFrame(visits(ROWS)).write_csv(datetime_format="%Y-%m-%dT%H:%M:%SZ").splitlines()
    head, lines = lines[0], lines[1:]
    bad = {
        3: (
            "3,anna,one,3.0,,true,2024-03-01T11:15:00Z",
            "shop",
            "must be a whole number, not 'one'",
        ),
        10: ("10,anna,2,-1,,true,2024-03-01T09:30:00Z", "amount", "must be at least 0"),
        11: ("11,anna,2", "", "has 3 values for 7 columns"),
        20: ("20,,3,20.0,,true,2024-03-01T07:00:00Z", "customer", "must not be null"),
        21: ("21,anna,1,inf,,true,2024-03-01T06:45:00Z", "amount", "must be finite"),
        40: (
            "40,anna,2,1.0,,maybe,2024-03-01T02:00:00Z",
            "member",
            "must be true or false, not 'maybe'",
        ),
        59: (
            "59,anna,3,9.0,,true,noon",
            "at",
            "must be an ISO 8601 time like 2013-03-01T13:15:00Z, not 'noon'",
        ),
    }
    for row, (line, _, _) in bad.items():
        lines[row] = line
    source = tmp_path / "in.csv"
    source.write_text("\n".join([head, *lines]))
    result = score(
        batch_home, packages[0], source, tmp_path / "out.csv", max_rejected=0.2, piece_rows=9
    )
    kept = [row for row in range(ROWS) if row not in bad]
    found = duckdb.sql(f"select number, score from read_csv('{tmp_path / 'out.csv'}')").fetchall()
    assert [int(row[0]) for row in found] == kept
    expected = by_hand(visits(ROWS), packages[0])[kept]
    np.testing.assert_allclose([row[1] for row in found], expected, atol=1e-6)
    told = pq.read_table(tmp_path / "out.csv.rejected.parquet").to_pylist()
    assert [(t["row"], t["field"], t["reason"]) for t in told] == [
        (row, field, reason) for row, (_, field, reason) in bad.items()
    ]
    assert "noon" in told[-1]["values"]
    assert {t["file"] for t in told} == {str(source)}
    assert (result.rows, result.rejected) == (len(kept), len(bad))
    assert result.reasons["shop must be a whole number"] == 1


@pytest.mark.usefixtures("here")
def test_json_lines_that_do_not_fit(batch_home: Home, packages: list[Path], tmp_path: Path) -> None:
    import json

    rows = visits(ROWS).to_pylist()
    for row in rows:
        row["at"] = row["at"].isoformat()
    lines = [json.dumps(row) for row in rows]
    lines[2] = "{"
    lines[5] = json.dumps(rows[5] | {"shop": "1"})
    lines[6] = json.dumps(rows[6] | {"extra": 1})
    lines[7] = json.dumps({k: v for k, v in rows[7].items() if k != "coupon"})
    lines[8] = json.dumps(rows[8] | {"amount": True})
    lines.insert(9, "")
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n\n")
    # The field "extra" would be known, were it in the first file.
    score(
        batch_home, packages[0], tmp_path / "in.jsonl", tmp_path / "o", max_rejected=1, piece_rows=4
    )
    told = pq.read_table(tmp_path / "o.rejected.parquet").to_pylist()
    assert [(t["row"], t["field"]) for t in told] == [
        (2, ""), (5, "shop"), (7, "coupon"), (8, "amount"),
    ]  # fmt: skip


@pytest.mark.usefixtures("here")
def test_ids_that_come_twice_are_refused_but_for_the_first(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = visits(ROWS)
    ids = [f"v{row % 50}" for row in range(ROWS)]
    ids[7] = None
    source = place(table.append_column("visit", pa.array(ids)), tmp_path / "in")
    score(batch_home, packages[0], source, tmp_path / "o", id="visit", max_rejected=1, piece_rows=8)
    told = pq.read_table(tmp_path / "o.rejected.parquet").to_pylist()
    again = [row for row in range(50, ROWS) if row != 57]
    assert [(t["row"], t["reason"]) for t in told] == [
        (7, "must not be null"), *((row, "comes twice") for row in again)
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "o")["visit"].to_pylist().count("v0") == 1


@pytest.mark.usefixtures("here")
def test_too_many_rejected_rows_leave_the_old_output(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = visits(24)
    nulls = pa.array([None] + [1.0] * 23)
    table = table.set_column(table.column_names.index("amount"), "amount", nulls)
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.parquet").write_bytes(b"old")
    with pytest.raises(DataError, match="1 of 24 rows") as caught:
        score(batch_home, packages[0], tmp_path / "in.parquet", tmp_path / "out")
    assert "amount must not be null" in caught.value.why
    assert (tmp_path / "out" / "old.parquet").read_bytes() == b"old"
    assert pq.read_table(tmp_path / "out.rejected.parquet")["row"].to_pylist() == [0]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("held_rows", [0, 100])
def test_an_interrupted_batch_goes_on_and_another_one_begins_anew(
    batch_home: Home,
    packages: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_rows: int,
) -> None:
    """With the views in memory or read as they are needed."""
    monkeypatch.setattr(worker, "_HELD_ROWS", held_rows)
    table = visits(ROWS).take(list(reversed(range(ROWS))))
    source, output = place(table, tmp_path / "in"), tmp_path / "out"
    begun: list[int] = []
    usual = PieceScorer.score

    def breaking(self: PieceScorer, piece: Any) -> Any:
        begun.append(piece.number)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return usual(self, piece)

    monkeypatch.setattr(PieceScorer, "score", breaking)
    with pytest.raises(KeyboardInterrupt):
        score(batch_home, packages[0], source, output, piece_rows=10)
    assert not output.exists()
    # Features that come in meanwhile are not for this batch, whose last rows would have them.
    at = shop.NOW.replace(hour=11, minute=30)
    fields = {n: [1.0] for n in ("visits_1d", "visits_7d", "mean_1d", "mean_7d")}
    store = batch_world.OfflineStore(batch_home.offline("shop"), shop.features())
    store.append("shop_day", late_row(at, fields), batch_world.to_us(at) + 1)
    result = score(batch_home, packages[0], source, output, piece_rows=10)
    assert begun == [0, 1, 2, 3, 3, 4, 5, 6], "only what was not finished"
    assert result.resumed_pieces == 3
    check_scores(pq.read_table(output), table, packages[0])
    begun[:] = []
    with pytest.raises(KeyboardInterrupt):
        score(batch_home, packages[0], source, output, piece_rows=10)
    begun[:] = [0] * 4
    other = score(batch_home, packages[1], source, output, piece_rows=10)
    assert other.resumed_pieces == 0
    assert left_over(tmp_path) == []


def late_row(at: Any, fields: dict[str, list[float]]) -> pa.Table:
    moment = pa.array([at], pa.timestamp("us", tz="UTC"))
    keys = {"shop": pa.array([1], pa.int64())}
    return pa.table(keys | {"event_time": moment, "created_time": moment} | fields)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["parquet", "delta", "csv"])
@pytest.mark.parametrize("after", [False, True])
def test_a_death_while_the_output_is_put_in_place_neither_loses_nor_doubles(
    batch_home: Home,
    packages: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    after: bool,
) -> None:
    """The process dies before or after the commit; then the same call comes again."""
    table = visits(ROWS)
    source = place(table, tmp_path / "in")
    output = tmp_path / ("out.csv" if kind == "csv" else "out")
    how = {"piece_rows": 10, "append": kind == "delta", "log": True}
    how |= {} if kind == "csv" else {"output_format": kind}
    usual = scoring._settle

    def dying(batch: Any, result: Any, folder: Any, place: Any, schema: Any) -> None:
        if after:
            place.commit(result.job, schema, folder.parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_settle", dying)
    with pytest.raises(KeyboardInterrupt):
        score(batch_home, packages[0], source, output, **how)
    monkeypatch.setattr(scoring, "_settle", usual)
    result = score(batch_home, packages[0], source, output, **how)
    assert result.rows == ROWS
    found = {
        "delta": lambda: pl.read_delta(str(output)),
        "csv": lambda: pl.read_csv(output),
        "parquet": lambda: pl.read_parquet(output / "*.parquet"),
    }[kind]()
    assert sorted(found["number"].cast(pl.Int64).to_list()) == list(range(ROWS))
    assert left_over(tmp_path) == []


@pytest.mark.usefixtures("here")
def test_one_run_puts_its_rows_there_once(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    """The process may die after the last of its work, and the run is resumed."""
    source = place(visits(ROWS), tmp_path / "in")
    how = {"log": True, "run": "monday"}
    first, again = (
        score(batch_home, packages[0], source, tmp_path / "out", **how) for _ in range(2)
    )
    assert (first.was_there, again.was_there) == (False, True)
    logged = read_predictions(batch_home.predictions("shop"))
    assert logged.num_rows == ROWS
    assert set(logged["route"].to_pylist()) == {"batch"}
    scored = pq.read_table(tmp_path / "out")
    told = dict(zip(logged["id"].to_pylist(), logged["score"].to_pylist(), strict=True))
    assert [told[f"{first.job}-{row}"] for row in range(ROWS)] == scored["score"].to_pylist()


def halved(scores: Any, columns: Any) -> Any:
    return scores / 2


@pytest.mark.usefixtures("here")
def test_the_serving_graph_is_applied_as_online(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    """The model and one that weighs three times as much; then a function."""
    table = visits(ROWS)
    pq.write_table(table, tmp_path / "in.parquet")
    graph = Graph(after=("serving.test_serving_batch.halved",), members={"first": 3.0})
    other = ModelVersion(name="shop", version=2, package=str(packages[1]), digest="")
    score(
        batch_home,
        packages[0],
        tmp_path / "in.parquet",
        tmp_path / "out",
        serving=Serving(graph=graph),
        members=[(other, 3.0)],
    )
    scores = [by_hand(table, package) for package in packages[:2]]
    found = pq.read_table(tmp_path / "out")["score"].to_numpy()
    np.testing.assert_allclose(found, (scores[0] + 3 * scores[1]) / 8, atol=1e-6)


@pytest.mark.usefixtures("here")
def test_drift_is_that_of_the_features_against_the_reference(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    table = visits(ROWS)
    result = score(batch_home, packages[0], place(table, tmp_path / "in"), tmp_path / "out")
    assert result.profiled_rows == ROWS
    reference = read(packages[0]).reference
    amounts = reference.bins["amount"].count(np.arange(ROWS, dtype=np.float64))
    assert result.psi["amount"] == pytest.approx(psi(reference.profile.counts["amount"], amounts))
    assert result.psi.keys() == reference.bins.keys()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"amount": None}, SchemaError, "amount"),
        ({"amount": ["much"] * 24}, SchemaError, "amount"),
        ({"at": list(range(24))}, SchemaError, "at"),
        ({"score": [0.0] * 24}, SchemaError, "score"),
    ],
)
def test_wrong_column_is_named_before_anything_runs(
    batch_home: Home,
    packages: list[Path],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    table = visits(24)
    columns = dict(zip(table.column_names, table.columns, strict=True)) | change
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(error, match=text):
        score(batch_home, packages[0], tmp_path / "in.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_worker_that_fails_is_quoted(
    ray_cluster: Any, batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    told = shop.features().model_dump()
    told["on_demand"]["facts"]["function"] = "serving.batch_world.broken_facts"
    source = place(visits(24), tmp_path / "in")
    features = Features.model_validate(told)
    with pytest.raises(ServingError, match="could not be scored") as caught:
        score(batch_home, packages[0], source, tmp_path / "out", features=features)
    assert "no shop is open" in caught.value.why
    assert "Traceback" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_broken_package_is_named(batch_home: Home, packages: list[Path], tmp_path: Path) -> None:
    pq.write_table(visits(3), tmp_path / "in.parquet")
    with pytest.raises(MlopsRayError, match="no readable model package"):
        score(batch_home, packages[3], tmp_path / "in.parquet", tmp_path / "out")


def test_missing_input(batch_home: Home, packages: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        score(batch_home, packages[0], tmp_path / "nowhere", tmp_path / "out")


def test_one_call_at_a_time_writes_an_output(
    batch_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    from mlops_ray.config.batch import BatchPredict
    from mlops_ray.serving.batch.outputs import job_home

    pq.write_table(visits(3), tmp_path / "in.parquet")
    out = tmp_path / "out"
    folder = job_home(BatchPredict(model="m@1", input="i", output=out), batch_home)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ServingError, match="another process"):
            score(batch_home, packages[0], tmp_path / "in.parquet", out)
