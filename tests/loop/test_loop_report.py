from __future__ import annotations

import html.parser
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score

from mlops_ray.loop.page import highest_drift, render
from mlops_ray.loop.recording import ROW, Recording, Sent
from mlops_ray.loop.report import summary_table, write
from mlops_ray.loop.results import ReplayResult
from mlops_ray.loop.summary import scored_rows, summarise

START = datetime(2013, 3, 1, tzinfo=UTC)
DAYS = 70
PER_DAY = 60
NASTY = "<script>alert('x')</script>"


def recorded(folder: Path) -> ReplayResult:
    """A replay whose second version, from day 20 on, is better than the first."""
    recording = Recording(folder)
    recording.clear()
    chance = np.random.default_rng(11)
    history: list[dict[str, Any]] = []
    for number in range(DAYS):
        at = START + timedelta(days=number)
        version = 1 if number < 20 else 2
        times = [at + timedelta(minutes=20 * row) for row in range(PER_DAY)]
        truth = chance.random(PER_DAY) < 0.3
        static = np.clip(0.3 + 0.2 * (truth - 0.3) + chance.normal(0, 0.2, PER_DAY), 0.01, 0.99)
        better = np.clip(0.3 + 0.4 * (truth - 0.3) + chance.normal(0, 0.2, PER_DAY), 0.01, 0.99)
        known = chance.random(PER_DAY) < 0.95
        columns = {
            "id": pa.array([f"{number}-{row}" for row in range(PER_DAY)]),
            "time": pa.array(times, ROW.field("time").type),
            "version": pa.array([version] * PER_DAY, pa.int64()),
            "score": pa.array(static if version == 1 else better),
            "label": pa.array([float(t) if k else None for t, k in zip(truth, known, strict=True)]),
            "known_at": pa.array(times, ROW.field("time").type),
        }
        if version == 2:  # the first version has no shadow of its own
            columns["shadow_first"] = pa.array(static)
        sent = Sent()
        for row in range(PER_DAY):
            sent.add(times[row], 1, 1.0 + row / PER_DAY, None, "predict")
        recording.write(at, pa.table(columns), sent)
        psi = {"calm": 0.01, "drifting": 0.02 * number, NASTY: 0.3}
        history.append(
            {
                "kind": "measured",
                "at": at.isoformat(),
                "version": version,
                "drift": {"rows": 100, "psi": psi, "noise": 0.01 if number % 10 else 0.3},
            }
        )
    triggered = {
        "number": 1,
        "submission_id": "job-1",
        "version": 1,
        "reason": NASTY,
        "evidence": {"psi_max": 0.4, "auc": None},
    }
    day = (START + timedelta(days=20)).isoformat()
    history.append({"kind": "trigger", "at": day, **triggered})
    ended = {"outcome": "succeeded", "promoted": True, "version": 2, "wall_s": 30.0}
    history.append({"kind": "retraining", "at": day, "number": 1, **ended})
    history.append({"kind": "trigger", "at": day, **triggered, "number": 2, "version": 2})
    recording.write_history(history)
    return ReplayResult(
        folder=str(folder),
        start=START,
        end=START + timedelta(days=DAYS),
        rows=DAYS * PER_DAY,
        requests=DAYS * PER_DAY,
        background_requests=7,
        failed_requests=0,
        unlogged_rows=0,
        p50_ms=1.5,
        p99_ms=1.98,
        wall_s=12.0,
        versions={"champion": 1, "first": 1},
    )


VERSIONS = [
    {
        "version": number,
        "aliases": ["first"] if number == 1 else ["champion"],
        "digest": f"digest{number}",
        "report": {"auc": 0.7, "log_loss": 0.5, "until": None},
        "lineage": {"code_commit": NASTY, "data_version": None},
    }
    for number in (1, 2, 3)
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = recorded(tmp_path_factory.mktemp("report") / "replay")
    head = {"project": "flights", "run_id": "run-1", "drift_threshold": 0.2}
    return head | summarise(result, VERSIONS) | {"folder": result.folder}


def test_months_are_what_polars_and_sklearn_say(document: dict[str, Any]) -> None:
    rows = Recording(Path(document["folder"])).rows()
    frame = pl.DataFrame(pl.from_arrow(rows)).filter(pl.col("label").is_not_null())
    frame = frame.with_columns(
        static=pl.when(pl.col("version") == 1).then("score").otherwise("shadow_first"),
        month=pl.col("time").dt.strftime("%Y-%m"),
    )
    assert [month["period"] for month in document["months"]] == ["2013-03", "2013-04", "2013-05"]
    for month in document["months"]:
        part = frame.filter(pl.col("month") == month["period"])
        label = part["label"].to_numpy()
        assert month["rows"] == len(part)
        assert month["positive_share"] == pytest.approx(label.mean())
        for who, column in (("loop", "score"), ("static", "static")):
            scores = part[column].to_numpy()
            assert month[f"auc_{who}"] == pytest.approx(roc_auc_score(label, scores))
            assert month[f"log_loss_{who}"] == pytest.approx(log_loss(label, scores))


def test_summary_agrees_with_the_rest(document: dict[str, Any]) -> None:
    summary, months = document["summary"], document["months"]
    promised = {
        "auc_loop_mean",
        "auc_static_mean",
        "retrainings",
        "promotions",
        "requests",
        "failed_requests",
        "p50_ms",
        "p99_ms",
        "wall_s",
    }
    assert promised <= set(summary)
    for name in ("auc_loop", "auc_static", "log_loss_loop", "log_loss_static"):
        mean = sum(month[name] for month in months) / len(months)
        assert summary[f"{name}_mean"] == pytest.approx(mean)
    assert summary["auc_gain_mean"] > 0.02
    assert (summary["retrainings"], summary["promotions"]) == (2, 1)
    assert [trigger["outcome"] for trigger in document["triggers"]] == ["succeeded", "unfinished"]
    labelled = document["rows"]["labelled"]
    assert sum(month["rows"] for month in months) == labelled
    assert sum(week["rows"] for week in document["weeks"]) == labelled
    assert sum(entry["rows"] for entry in document["calibration"]) == labelled
    assert document["rows"]["answered"] == labelled + document["rows"]["without_outcome"]
    answered = [version["rows_answered"] for version in document["versions"]]
    assert answered == [20 * PER_DAY, 50 * PER_DAY, 0]
    assert document["latency_ms"]["p100"] == pytest.approx(1 + 59 / 60)


def test_static_scores_come_from_the_shadow_or_the_answer(document: dict[str, Any]) -> None:
    rows = Recording(Path(document["folder"])).rows()
    scored = scored_rows(rows, 1)
    assert scored["static"].null_count == 0
    early = scored.slice(0, 100)
    assert early["static"].equals(early["loop"])
    assert scored_rows(rows, None)["static"].null_count > 0


def test_highest_drift_is_the_highest_of_the_week(document: dict[str, Any]) -> None:
    weeks, features, values = highest_drift(document["drift"])
    assert features == sorted(["calm", "drifting", NASTY])
    assert len(weeks) == 10
    row = values[features.index("drifting")]
    # Measured from day 1 on, every day but each tenth.
    days = [[d for d in range(1 + 7 * w, 8 + 7 * w) if d % 10 and d < DAYS] for w in range(10)]
    assert row == pytest.approx([max(0.02 * d for d in week) for week in days])


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.suspects: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.suspects.append(tag)
        self.suspects += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_safe_and_needs_nothing_else(document: dict[str, Any]) -> None:
    page = Page()
    text = render(document)
    page.feed(text)
    assert page.open == []
    assert page.suspects == []
    assert "url(" not in text
    shown = "".join(page.text)
    assert NASTY in shown
    assert "promoted v1 → v2" in shown
    for month in document["months"]:
        assert f"{month['auc_loop']:.3f}" in shown
    assert text.count("<svg") == 3


def test_an_empty_replay_still_has_a_page(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "replay")
    recording.clear()
    recording.write(START, ROW.empty_table(), Sent())
    recording.write_history([])
    nothing = {
        "folder": str(recording.folder),
        "start": START,
        "end": START + timedelta(days=1),
        "wall_s": 0.0,
        "versions": {},
        "p50_ms": None,
        "p99_ms": None,
    }
    counts = ("rows", "requests", "background_requests", "failed_requests", "unlogged_rows")
    result = ReplayResult.model_validate(nothing | dict.fromkeys(counts, 0))
    head = {"project": "p", "run_id": "r", "drift_threshold": 0.2}
    document = head | summarise(result, [])
    assert document["summary"]["auc_loop_mean"] is None
    write(tmp_path / "out", document)
    assert "Nothing was measured" in (tmp_path / "out" / "report.html").read_text()


def test_terminal_table_is_made_from_the_file(document: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, document)
    stored = json.loads((tmp_path / "report.json").read_text())
    console = Console(width=120, record=True)
    console.print(summary_table(stored))
    text = console.export_text()
    assert "2 retrainings, 1 promoted" in text
    assert "4,207 requests, 0 failed" in text
    assert f"{stored['summary']['auc_loop_mean']:.3f}" in text
    assert all(month["period"] in text for month in stored["months"])
