"""The verb ``init``: a new project that runs at once."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mlops_ray.errors import MlopsRayError

_SCAFFOLD = Path(__file__).parent / "scaffold"
_SUFFIX = ".template"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
# YAML and Hydra read these as something else than a word.
_NOT_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"})


@click.command(short_help="Make a new project that runs at once.")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="The folder to make; ./NAME when not given.",
)
@click.option("--package", help="Name of the project's Python package; NAME when not given.")
def init(name: str, directory: Path | None, package: str | None) -> None:
    """Make a new project NAME that runs at once, on generated data.

    It is a folder with a configuration, a small Python package, tests and a README that says what
    to change, step by step, until it is your own.

    \b
    Example:
      mlops-ray init late_orders
      cd late_orders
      mlops-ray run workflow=train
    """
    directory = directory if directory is not None else Path(name)
    package = package if package is not None else name
    _check_name(name)
    _check_directory(directory)
    _check_package(package)
    write_project(directory, name, package)
    click.secho("ok: ", fg="green", nl=False)
    click.echo(f"made the project {name} in {directory}. Next:")
    steps = ("mlops-ray check", "mlops-ray run workflow=train")
    for command in (f"cd {shlex.quote(str(directory))}", *steps):
        click.echo(f"  {command}")
    click.echo(f"Then {directory / 'README.md'} says what to change to make it yours.")


def write_project(directory: Path, name: str, package: str) -> None:
    """Write the scaffold into ``directory``, which is made where it is missing.

    Raises:
        MlopsRayError: The folder or a file cannot be written; what was there is not overwritten.
    """
    try:
        for path, text in render(name, package):
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        raise MlopsRayError(
            "the project cannot be written",
            where=str(directory),
            why=f"{error.strerror or error}: {error.filename}",
            fix="choose a folder that you may write to, with --directory",
        ) from error


def render(name: str, package: str) -> Iterator[tuple[Path, str]]:
    """Yield each file of a new project: its path inside the project, and its text."""
    for template in sorted(_SCAFFOLD.rglob(f"*{_SUFFIX}")):
        path = template.relative_to(_SCAFFOLD).as_posix().removesuffix(_SUFFIX)
        text = template.read_text(encoding="utf-8")
        yield Path(_fill(path, name, package)), _fill(text, name, package)


def _fill(text: str, name: str, package: str) -> str:
    return text.replace("{{name}}", name).replace("{{package}}", package)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _NOT_WORDS:
        raise _invalid(
            name,
            "a project's name",
            "use lower-case letters, digits and _, beginning with a letter, at most 63",
        )


def _check_package(package: str) -> None:
    if not _NAME.fullmatch(package) or package in _NOT_WORDS or keyword.iskeyword(package):
        raise _invalid(
            package,
            "a package's name",
            "give another one with --package: lower-case letters, digits and _",
        )
    if package in _taken():
        raise _invalid(
            package,
            "a package's name",
            "give another one with --package",
            why="the project has a folder of that name for something else",
        )
    if package in sys.stdlib_module_names or _is_installed(package):
        raise _invalid(
            package,
            "a package's name",
            "give another one with --package",
            why="there is an installed module of that name, which one would hide the other",
        )


def _is_installed(package: str) -> bool:
    """Any folder on the path is found too, as a package without code: it hides nothing."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _taken() -> set[str]:
    return {path.name for path in _SCAFFOLD.iterdir() if path.is_dir()}


def _check_directory(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        kind = "a folder that is not empty" if directory.is_dir() else "a file"
        raise MlopsRayError(
            "there is something there already; nothing was written",
            where=str(directory),
            why=f"it is {kind}",
            fix="choose another folder with --directory, or another name",
        )


def _invalid(given: str, what: str, fix: str, *, why: str = "") -> MlopsRayError:
    error = MlopsRayError(
        f"{given!r} cannot be {what}; nothing was written", why=why, fix=f"{fix}{_proposal(given)}"
    )
    error.exit_code = 2
    return error


def _proposal(given: str) -> str:
    """Return an example made from what was given, where there is an obvious one."""
    proposal = re.sub(r"[^a-z0-9]+", "_", given.lower()).strip("_0123456789")
    valid = _NAME.fullmatch(proposal) and proposal != given and not keyword.iskeyword(proposal)
    return f", for example {proposal}" if valid and proposal not in _NOT_WORDS else ""
