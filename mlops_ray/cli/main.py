"""The ``mlops-ray`` command: verbs, options common to all, and how errors are shown."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import click

from mlops_ray import __version__
from mlops_ray.errors import ConfigError, MlopsRayError

_INTERRUPTED = 130

_EPILOG = """
\b
Examples:
  mlops-ray init my_project
  mlops-ray check project=flights
  mlops-ray run workflow=train project=flights training.epochs=2
  mlops-ray run workflow=train project=flights training.learning_rate=3e-3,1e-3 -m
  mlops-ray features get weather origin=JFK project=flights
  mlops-ray lineage flights@champion --svg lineage.svg
  mlops-ray reproduce flights@7
  ray job submit --working-dir . -- mlops-ray run workflow=train project=flights
"""


class Verbs(click.Group):
    """A group whose verbs are imported when they are used, so that ``--help`` is quick."""

    verbs: ClassVar[dict[str, str]] = {
        "init": "mlops_ray.cli.init:init",
        "check": "mlops_ray.cli.plans:check",
        "plan": "mlops_ray.cli.plans:plan",
        "run": "mlops_ray.cli.workflow:run",
        "submit": "mlops_ray.cli.workflow:submit",
        "predict": "mlops_ray.cli.predict:predict",
        "why": "mlops_ray.cli.why:why",
        "cancel": "mlops_ray.cli.cancel:cancel",
        "resolve": "mlops_ray.cli.resolve:resolve",
        "features": "mlops_ray.cli.features:features",
        "status": "mlops_ray.cli.status:status",
        "logs": "mlops_ray.cli.logs:logs",
        "models": "mlops_ray.cli.models:models",
        "endpoints": "mlops_ray.cli.endpoints:endpoints",
        "lineage": "mlops_ray.cli.lineage:lineage",
        "reproduce": "mlops_ray.cli.reproduce:reproduce",
        "rerun": "mlops_ray.cli.reproduce:rerun",
        "gc": "mlops_ray.cli.gc:gc",
        "tokens": "mlops_ray.cli.tokens:tokens",
        "triggers": "mlops_ray.cli.triggers:triggers",
        "doctor": "mlops_ray.cli.doctor:doctor",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which a newcomer meets them."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb."""
        if cmd_name not in self.verbs:
            return None
        import importlib

        module, _, name = self.verbs[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; where there is none of that name, say which was meant."""
        if args and args[0] not in self.verbs and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.verbs, n=1)
            meant = f"Did you mean {close[0]}?" if close else f"Verbs: {', '.join(self.verbs)}."
            ctx.fail(f"there is no verb {args[0]!r}. {meant}")
        return super().resolve_command(ctx, args)


@click.command(cls=Verbs, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlops-ray")
@click.option(
    "-C",
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Work as if started in this folder.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, directory: Path | None, debug: bool) -> None:
    """Run the whole life of a machine-learning product as one closed loop on one Ray cluster."""
    if directory is not None:
        os.chdir(directory)
    context.obj = {"debug": debug}
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)


def main() -> None:
    """Run the command line; exit 0 on success, 1 on failure, 2 on a mistake in the input."""
    debug = "--debug" in sys.argv
    try:
        code: Any = cli(standalone_mode=False, prog_name="mlops-ray")
    except (click.exceptions.Abort, KeyboardInterrupt):
        # click turns Ctrl-C into Abort.
        click.echo("\ninterrupted; the same command goes on from the finished steps", err=True)
        sys.exit(_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MlopsRayError as error:
        if debug:
            raise
        show_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        from mlops_ray.metadata.redaction import redacted

        text = f"internal error: {type(error).__name__}: {redacted(str(error))}"
        click.secho(text, fg="red", err=True)
        click.echo("  fix: run the same command with `mlops-ray --debug …` for details", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def show_error(error: MlopsRayError) -> None:
    """Print an error for a person: what, where, why, and what to do."""
    if isinstance(error, ConfigError):
        click.secho(f"error: {error.what}", fg="red", err=True)
        for problem in error.problems:
            click.echo(f"  {problem}", err=True)
        return
    first, *rest = str(error).splitlines()
    click.secho(f"error: {first}", fg="red", err=True)
    for line in rest:
        click.echo(line, err=True)
