"""The report as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any

from mlops_ray.loop.charts import Line, Mark, calibration_chart, heatmap, line_chart
from mlops_ray.loop.style import STYLE

Document = Mapping[str, Any]

_MOST_FEATURES = 40
_WEEK = timedelta(days=7)
_DASH = "–"
# Smaller differences print as zero, which is neither good nor bad.
_SHOWN = 0.0005


def render(document: Document) -> str:
    """Return the page of a report (see ``summarise``) as HTML."""
    project = escape(str(document["project"]))
    sections = [
        _header(document),
        _tiles(document["summary"]),
        _over_time(document),
        _months(document["months"]),
        _drift(document["drift"], document["drift_threshold"]),
        _calibration(document["calibration"]),
        _triggers(document["triggers"]),
        _versions(document["versions"]),
        _failures(document["failures"]),
        _footer(document),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{project}: the loop's report</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(document: Document) -> str:
    start, end = (_moment(document["period"][key]) for key in ("start", "end"))
    summary = document["summary"]
    return (
        f"<header><h1>{escape(str(document['project']))}</h1>"
        f"<p>{summary['rows']:,} rows replayed from {start:%-d %B %Y} to {end:%-d %B %Y}: "
        "the model that the loop kept retraining, against the first model left alone, on the same "
        "requests.</p></header>"
    )


def _tiles(summary: Document) -> str:
    gain = summary["auc_gain_mean"]
    failed = summary["failed_requests"]
    tiles = [
        ("AUC, the loop", _number(summary["auc_loop_mean"]), "mean of the months", "loop"),
        (
            "AUC, first model",
            _number(summary["auc_static_mean"]),
            f"the loop gains {gain:+.3f}" if gain is not None else "not known",
            "static",
        ),
        (
            "Retrainings",
            f"{summary['retrainings']}",
            f"{summary['promotions']} promoted, {summary['failed_retrainings']} failed",
            "",
        ),
        (
            "Failed requests",
            f"{failed:,}",
            f"of {summary['requests'] + summary['background_requests']:,}",
            "bad" if failed else "",
        ),
        (
            "Latency",
            _milliseconds(summary["p50_ms"]),
            f"p99 {_milliseconds(summary['p99_ms'])}",
            "",
        ),
        ("Wall time", _minutes(summary["wall_s"]), "of the replay", ""),
    ]
    cells = "".join(
        f'<div class="tile {style}"><span>{escape(name)}</span><b>{value}</b><i>{escape(note)}</i>'
        "</div>"
        for name, value, note, style in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _over_time(document: Document) -> str:
    start, end = (_moment(document["period"][key]) for key in ("start", "end"))
    lines = [
        Line(name, style, _points(document["weeks"], f"auc_{style}", end))
        for name, style in (("first", "static"), ("loop", "loop"))
    ]
    marks = [_trigger_mark(trigger) for trigger in document["triggers"]]
    chart = line_chart(lines, marks, start, end, "AUC by week, of the loop and of the first model")
    return _section(
        "AUC over time",
        "By week, on the rows whose outcome is known. A line marks a retraining, with the version "
        "that it brought into service; a dashed one was not promoted.",
        f'<div class="wide">{chart}</div>',
    )


def _trigger_mark(trigger: Document) -> Mark:
    promoted = trigger["promoted"]
    outcome = f"promoted v{trigger['to_version']}" if promoted else trigger["outcome"]
    return Mark(
        at=_moment(trigger["at"]),
        label=f"v{trigger['to_version']}" if promoted else "×",
        hint=f"{_day(trigger['at'])}: {trigger['reason']} → {outcome}",
        style="promoted" if promoted else "rejected",
    )


def _months(months: Sequence[Document]) -> str:
    rows = [
        [
            escape(month["period"]),
            f"{month['rows']:,}",
            _share(month["positive_share"]),
            f"<b>{_number(month['auc_loop'])}</b>",
            _number(month["auc_static"]),
            _gain(month["auc_loop"], month["auc_static"], up=True),
            f"<b>{_number(month['log_loss_loop'])}</b>",
            _number(month["log_loss_static"]),
            _gain(month["log_loss_loop"], month["log_loss_static"], up=False),
        ]
        for month in months
    ]
    heads = ["month", "labelled", "positive", "AUC loop", "first", "gain"]
    heads += ["log loss loop", "first", "gain"]
    return _section("By month", "", _table(heads, rows, numeric_from=1))


def _drift(drift: Document, threshold: float) -> str:
    columns, features, values = highest_drift(drift)
    shown = sorted(
        range(len(features)), key=lambda r: -max((v for v in values[r] if v is not None), default=0)
    )[:_MOST_FEATURES]
    chart = heatmap(
        [features[r] for r in shown],
        columns,
        [values[r] for r in shown],
        threshold,
        "PSI of each feature over time",
    )
    rest = len(features) - len(shown)
    hidden = f" The {rest} features that drifted least are not shown." if rest else ""
    return _section(
        "Drift",
        "Population stability index of each feature against the training data of the version in "
        f"service, the highest of each week or day. It starts anew with each promoted version.{hidden}",
        f'<div class="legend"><span class="under"><i></i>below {threshold:g}</span>'
        f'<span class="over"><i></i>{threshold:g}, a drift, to 0.5 and more</span></div>'
        f'<div class="wide">{chart}</div>',
    )


def highest_drift(drift: Document) -> tuple[list[datetime], list[str], list[list[float | None]]]:
    """Return weeks, features and the highest PSI of each week, [features][weeks].

    Of less than ten weeks, days instead of weeks.
    """
    times = [_moment(time) for time in drift["times"]]
    if not times:
        return [], [], []
    span = _WEEK if times[-1] - times[0] >= 9 * _WEEK else _WEEK / 7
    weeks = [(time - times[0]) // span for time in times]
    columns = [times[0] + span * week for week in range(weeks[-1] + 1)]
    values: list[list[float | None]] = []
    for row in drift["psi"]:
        highest: list[float | None] = [None] * len(columns)
        for week, value in zip(weeks, row, strict=True):
            if value is not None:
                highest[week] = max(value, highest[week] or 0.0)
        values.append(highest)
    return columns, list(drift["features"]), values


def _calibration(bins: Sequence[Document]) -> str:
    chart = calibration_chart(
        [(b["score"], b["share"], b["rows"]) for b in bins], "Share of positives by mean score"
    )
    return _section(
        "Calibration of the loop",
        "Share of positives among rows of a similar score. On the dashed line a score is a "
        "probability; the area of a dot is its number of rows.",
        f'<div class="square">{chart}</div>',
    )


def _triggers(triggers: Sequence[Document]) -> str:
    if not triggers:
        return _section("Triggers", "The monitor triggered no retraining.", "")
    rows = [
        [
            str(trigger["number"]),
            _day(trigger["at"]),
            f'<div class="why">{escape(trigger["reason"])}{_evidence(trigger["evidence"])}</div>',
            _outcome(trigger),
            _duration(trigger["wall_s"]),
        ]
        for trigger in triggers
    ]
    heads = ["", "when", "why", "outcome", "took"]
    return _section("Triggers", "Each was decided by the monitor alone.", _table(heads, rows))


def _outcome(trigger: Document) -> str:
    if trigger["promoted"]:
        change = f"v{trigger['from_version']} → v{trigger['to_version']}"
        return f'<span class="good">promoted</span> {change}'
    if trigger["outcome"] == "succeeded":
        return "not better, not promoted"
    return f'<span class="bad">{escape(trigger["outcome"])}</span> {escape(trigger["message"])}'


def _evidence(evidence: Document) -> str:
    pairs = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{_value(value)}</dd>"
        for name, value in evidence.items()
        if value not in (None, "")
    )
    return f"<details><summary>evidence</summary><dl>{pairs}</dl></details>"


def _versions(versions: Sequence[Document]) -> str:
    rows = [
        [
            f"<b>v{version['version']}</b> {_aliases(version['aliases'])}",
            _number(version["auc"]),
            _number(version["log_loss"]),
            f"{version['rows_answered']:,}",
            f"{_day(version['served_from'])} {_DASH} {_day(version['served_to'])}"
            if version["rows_answered"]
            else "never",
            _evidence_of_lineage(version),
        ]
        for version in versions
    ]
    heads = ["version", "AUC", "log loss", "rows answered", "answered", "lineage"]
    return _section(
        "Versions",
        "AUC and log loss are those of the evaluation that decided over each version.",
        _table(heads, rows),
    )


def _evidence_of_lineage(version: Document) -> str:
    known = {"package_digest": version["digest"], **version["lineage"]}
    pairs = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd><code>{_value(value)}</code></dd>"
        for name, value in known.items()
    )
    return f"<details><summary>{len(known)} facts</summary><dl>{pairs}</dl></details>"


def _failures(failures: Sequence[Document]) -> str:
    if not failures:
        return ""
    rows = [
        [escape(failure["time"]), escape(failure["kind"]), escape(failure["error"])]
        for failure in failures
    ]
    return _section("Failed requests", "The first of them.", _table(["time", "kind", "why"], rows))


def _footer(document: Document) -> str:
    rows = document["rows"]
    latency = " · ".join(
        f"{name} {_milliseconds(value)}" for name, value in document["latency_ms"].items()
    )
    return (
        f"<footer>{rows['answered']:,} rows answered, {rows['labelled']:,} with a known outcome, "
        f"{rows['without_outcome']:,} without (left out of all metrics). "
        f"Latency seen by the client: {latency}. Run {escape(str(document['run_id']))}.</footer>"
    )


def _section(title: str, note: str, body: str) -> str:
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 99) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="number">{value}</{tag}>'
            if place >= numeric_from
            else f"<{tag}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(heads, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _points(weeks: Sequence[Document], name: str, end: datetime) -> list[tuple[datetime, float]]:
    """Return the middle of each week with its value; a stump of a week at an end says little."""
    most = max((week["rows"] for week in weeks), default=0)
    full = [week for week in weeks if week["rows"] >= most / 3]
    middle = [(_moment(week["period"]) + _WEEK / 2, week[name]) for week in full]
    return [(min(at, end), value) for at, value in middle if value is not None]


def _aliases(aliases: Sequence[str]) -> str:
    return "".join(f'<span class="chip">{escape(alias)}</span>' for alias in aliases)


def _gain(loop: float | None, static: float | None, *, up: bool) -> str:
    if loop is None or static is None:
        return _DASH
    gained = loop - static if up else static - loop
    if abs(gained) < _SHOWN:
        return "0.000"
    return f'<span class="{"good" if gained > 0 else "bad"}">{gained:+.3f}</span>'


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return _DASH if value is None else f"{value:.1%}"


def _value(value: Any) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _milliseconds(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3g} ms"


def _minutes(seconds: float | None) -> str:
    return _DASH if seconds is None else f"{seconds / 60:.1f} min"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes}:{rest:02} min"


def _day(moment: str | None) -> str:
    return _DASH if moment is None else f"{_moment(moment):%-d %b %Y}"


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
