"""The verb ``predict``: score a whole table, file or folder with a registered model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, get_args

import click

from mlops_ray.config.batch import BatchPredict, Format

if TYPE_CHECKING:
    from mlops_ray.serving.batch.report import BatchResult

_STEP = "batch_predict"
_WORTH_A_LOOK = 0.1
_SHOWN_FEATURES = 5

_EPILOG = """
\b
Examples:
  mlops-ray predict --model shop@champion --input visits/ --output scored/ project=shop
  mlops-ray predict --model shop@7 --input visits.csv --output scored.csv project=shop
  mlops-ray predict --model shop@champion --input visits.parquet --output lake/scored \\
      --output-format delta --append --log project=shop
  mlops-ray predict --model shop@champion --input sqlite:///shop.db \\
      --query "select * from visits" --output sqlite:///shop.db --table scored project=shop
"""

_format = click.Choice(get_args(Format))


@click.command(
    short_help="Score files, a table or a query with a registered model.", epilog=_EPILOG
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", required=True, help="NAME@ALIAS or NAME@VERSION.")
@click.option("--input", required=True, help="File, folder, glob, Delta table or database URL.")
@click.option("--output", required=True, help="Folder, file of CSV or JSON, Delta table or URL.")
@click.option("--input-format", type=_format, help="Where the name of the input does not tell.")
@click.option("--output-format", type=_format, help="Where its name does not tell: the input's.")
@click.option("--query", help="What to read of a database.")
@click.option("--table", help="Where to write in a database.")
@click.option("--append", is_flag=True, help="Add to a Delta table or SQL; else it is replaced.")
@click.option("--id", "id_", help="A column in which no value may come twice.")
@click.option("--rejected", help="Parquet file for rows that cannot be scored, with the reason.")
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    help=f"Share of such rows up to which all is well [default: "
    f"{BatchPredict.model_fields['max_rejected'].default}].",
)
@click.option("--log", is_flag=True, help="Put the rows into the prediction log too.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: the cluster's CPUs.")
@click.option("--batch-rows", type=click.IntRange(1), help="Rows that a worker holds at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def predict(overrides: tuple[str, ...], as_json: bool, id_: str | None, **options: Any) -> None:
    """Score rows with a registered model: the workflow batch_predict, declared on the command line.

    The rows hold the inputs of the model's feature service: entity keys, a time and facts. Stored
    features are looked up as of each row's time. The output has the rows with score,
    predicted_label and model_version. Interrupted, the same command goes on, and no row is lost or
    comes twice. KEY=VALUE are Hydra overrides, as for every verb: project=shop.
    """
    from mlops_ray.cli.workflow import run_declared

    given = {name: value for name, value in {**options, "id": id_}.items() if value}
    if options["max_rejected"] is not None:
        given["max_rejected"] = options["max_rejected"]
    declared = [f"++batch.{name}={_quoted(value)}" for name, value in given.items()]
    output = run_declared(["workflow=batch_predict", *overrides, *declared], _STEP)
    if as_json:
        click.echo(json.dumps(output, indent=2))
        return
    from mlops_ray.serving.batch.report import BatchResult

    _show(BatchResult.model_validate(output))


def _quoted(value: Any) -> str:
    """Return a value in Hydra's grammar, where only a quote and what stands before it is escaped."""
    if not isinstance(value, str):
        return json.dumps(value)
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"'{text}'"


def _show(result: BatchResult) -> None:
    click.secho(f"{result.rows:,} rows scored with {result.model}@{result.version}", bold=True)
    if result.was_there:
        click.echo("  an earlier call had put them there already: nothing was done")
    click.echo(f"  output: {result.output}")
    if result.resumed_pieces:
        click.echo(f"  {result.resumed_pieces} of {result.pieces} pieces were there already")
    if result.rejected:
        click.secho(f"  {result.rejected:,} rejected: {result.rejected_output}", fg="yellow")
        for reason, count in sorted(result.reasons.items(), key=lambda item: -item[1]):
            click.echo(f"    {count:>9,}  {reason}")
    if result.scores.mean is not None:
        click.echo(f"  mean score: {result.scores.mean:.4f}")
    drifted = sorted(result.psi.items(), key=lambda item: -item[1])[:_SHOWN_FEATURES]
    for name, value in drifted:
        colour = "yellow" if value >= _WORTH_A_LOOK else None
        click.secho(f"  PSI {value:6.3f}  {name}", fg=colour)
