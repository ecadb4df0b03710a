"""The verb ``gc``: removes artifacts that nothing needs; explains what it keeps and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from mlops_ray.config.base import parse_duration
from mlops_ray.config.locate import default_home
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home

if TYPE_CHECKING:
    from mlops_ray.metadata.leftovers import Leftover
    from mlops_ray.metadata.retention import Origins, Verdict


def _duration(_context: Any, _parameter: Any, value: str) -> timedelta:
    try:
        found: timedelta = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return found


@click.command(short_help="Remove artifacts that nothing needs.")
@click.option(
    "--older-than",
    default="30d",
    show_default=True,
    callback=_duration,
    help="Keep what runs made that ended within this time.",
)
@click.option(
    "--keep-runs",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Newest runs kept per workflow.",
)
@click.option("--dry-run", is_flag=True, help="Only explain.")
@click.option("--pin", "pinned", metavar="THING", help="Keep a run or an artifact for ever.")
@click.option("--unpin", "unpinned", metavar="THING", help="Take such a pin back.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every artifact.")
def gc(
    older_than: timedelta,
    keep_runs: int,
    dry_run: bool,
    pinned: str | None,
    unpinned: str | None,
    as_json: bool,
) -> None:
    """Remove artifacts that nothing needs, and checkpoints of trainings that are over.

    Kept are: what a registered model version was made from, what is pinned, all of the runs that
    are not over, of the newest runs of each workflow and of young runs, and whatever was written or
    used within a day. THING is a run's id or an artifact's digest.
    """
    from mlops_ray.metadata.access import open_ledger
    from mlops_ray.metadata.artifacts import open_artifacts
    from mlops_ray.metadata.belonging import require_own
    from mlops_ray.metadata.leftovers import find_leftovers, remove_leftovers
    from mlops_ray.metadata.retention import Policy, collect, make_plan, pin

    home = Home(default_home())
    if home.storage.ledger is None and not (home.root / "ledger.db").is_file():
        raise MlopsRayError(
            "nothing has run here yet",
            where=str(home.root),
            fix="set MLOPS_RAY_LEDGER as the runs had it, or go to the project's folder",
        )
    ledger, artifacts = open_ledger(home), open_artifacts(home)
    for thing, remove in ((pinned, False), (unpinned, True)):
        if thing is not None:
            pin(ledger, artifacts, thing, remove=remove)
            click.echo(f"{'unpinned' if remove else 'pinned'}: {thing}")
    if pinned is not None or unpinned is not None:
        return
    policy = Policy(older_than=older_than, keep_runs=keep_runs)
    plan = make_plan(ledger, artifacts, policy, registered=_registered(home))
    require_own(ledger, artifacts, plan)
    leftovers = find_leftovers(home, ledger.runs(limit=None), policy, datetime.now(UTC))
    if not dry_run:
        gone = {verdict.blob.digest for verdict in collect(artifacts, plan, policy.grace)}
        # What came into use in between has stayed.
        plan = [verdict for verdict in plan if verdict.kept or verdict.blob.digest in gone]
        remove_leftovers(leftovers)
    (_print_json if as_json else _print)(plan, leftovers, dry_run)


def _registered(home: Home) -> Origins | None:
    """Ask MLflow which model versions there are; where it is silent, all count that ever were."""
    if not tracking.is_there(home):
        return None
    from mlops_ray.metadata.redaction import redacted
    from mlops_ray.registry.registry import Registry

    try:
        return Registry(home).origins()
    except Exception as error:
        reason = redacted(str(error)).partition("\n")[0] or type(error).__name__
        click.secho(
            f"warning: MLflow does not answer, so every version counts as registered: {reason}",
            fg="yellow",
            err=True,
        )
        return None


def _print_json(plan: list[Verdict], leftovers: list[Leftover], dry_run: bool) -> None:
    document: dict[str, Any] = {"dry_run": dry_run}
    for name, kept in (("kept", True), ("collected", False)):
        sizes = [verdict.blob.size for verdict in plan if verdict.kept is kept]
        document[name] = {"artifacts": len(sizes), "bytes": sum(sizes)}
    document["checkpoints"] = [asdict(leftover) for leftover in leftovers]
    document["artifacts"] = [
        {
            "digest": verdict.blob.digest,
            "bytes": verdict.blob.size,
            "used_at": verdict.blob.used_at.isoformat(),
            "kept": verdict.kept,
            "reason": verdict.reason,
            "made_by": verdict.made_by,
        }
        for verdict in plan
    ]
    click.echo(json.dumps(document, default=str, indent=1))


def _print(plan: list[Verdict], leftovers: list[Leftover], dry_run: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlops_ray.metadata.retention import sums

    done = "would be removed" if dry_run else "removed"
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("artifacts", justify="right")
    table.add_column("size", justify="right")
    table.add_column("because", overflow="fold")
    groups = sorted(sums(plan).items(), key=lambda group: (not group[0][0], -group[1][1]))
    for (kept, reason), (count, size) in groups:
        table.add_row("kept" if kept else done, str(count), size_text(size), reason)
    if leftovers:
        size = sum(leftover.size for leftover in leftovers)
        table.add_row(
            done, str(len(leftovers)), size_text(size), "checkpoints and abandoned drafts"
        )
    Console().print(table)
    freed = sum(verdict.blob.size for verdict in plan if not verdict.kept)
    freed += sum(leftover.size for leftover in leftovers)
    click.echo(f"{size_text(freed)} {'would be freed' if dry_run else 'freed'}")


def size_text(size: float) -> str:
    """Write a number of bytes for people: ``size_text(1536)`` is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
