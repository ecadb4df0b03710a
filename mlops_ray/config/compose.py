"""Hydra's part: files and overrides in, one plain nested dict out, with the origin of each key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mlops_ray.config.locate import Workspace
from mlops_ray.errors import ConfigError, Problem

COMMAND_LINE = "command line"
_PRIMARY = "config"
_NAME = re.compile(r"^name:[ \t]+[\"']?([\w.-]+)", re.MULTILINE)


Origin = tuple[str, int | None]
"""File and line; the line is None where there is none."""


@dataclass(frozen=True)
class Composed:
    """A composed configuration: plain values, and for each dotted path its file and line.

    ``groups`` are the names of all config groups, ``workflows`` those of the group ``workflow``;
    ``workflow_names`` are the names that those of them give themselves which say one.
    """

    values: dict[str, Any]
    origins: dict[str, Origin] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    workflows: tuple[str, ...] = ()
    workflow_names: dict[str, str] = field(default_factory=dict)

    def origin(self, path: str) -> Origin:
        """Return file and line of the longest known prefix of ``path``; ("", None) without one."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            found = self.origins.get(".".join(parts[:length]))
            if found is not None:
                return found
        return "", None


def compose(workspace: Workspace, overrides: list[str]) -> Composed:
    """Compose ``config.yaml`` with Hydra's overrides.

    Overrides mean what they mean to Hydra, except that a plain ``a.b=c`` of an unknown key is let
    through here: the schema refuses it later, together with every other problem.

    Raises:
        ConfigError: Hydra or OmegaConf cannot compose or resolve the configuration.
    """
    loader = _loader(workspace)
    parsed = _parse(overrides)
    parsed = _with_only_project(loader, parsed, workspace.directory)
    lines = [_lenient(loader, override) for override in parsed]
    try:
        config = loader.load_configuration(_PRIMARY, lines, RunMode.RUN, from_shell=True)
        defaults = loader.compute_defaults_list(_PRIMARY, lines, RunMode.RUN).defaults
    except HydraException as error:
        raise ConfigError([_hydra_problem(error, loader)]) from error
    except yaml.YAMLError as error:
        raise ConfigError([_yaml_problem(error)]) from error
    except ValueError as error:
        raise ConfigError([Problem(_PRIMARY, f"{error}.", COMMAND_LINE)]) from error
    origins = _origins(loader, defaults, workspace.directory)
    for override in parsed:
        origins[override.key_or_group] = (COMMAND_LINE, None)
    groups = tuple(loader.list_groups(""))
    workflows = tuple(loader.get_group_options("workflow"))
    names = dict(_names(loader, workflows))
    return Composed(_plain(config, origins), origins, groups, workflows, names)


def sweep(overrides: list[str]) -> list[list[str]]:
    """Split sweeping overrides (``a=1,2``) into one list of overrides for each combination.

    Raises:
        ConfigError: An override cannot be parsed, or sweeps in a way that is not a list of choices.
    """
    try:
        (batch,) = BasicSweeper.split_arguments(_parse(overrides), max_batch_size=None)
    except HydraException as error:
        raise ConfigError([Problem("overrides", str(error), COMMAND_LINE)]) from error
    return [list(item) for item in batch]


def _loader(workspace: Workspace) -> ConfigLoaderImpl:
    Plugins.instance()
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    for index, folder in enumerate(workspace.search_path):
        path.append("main" if index == 0 else f"configs-{index}", f"file://{folder}")
    path.append("schema", "structured://")
    return ConfigLoaderImpl(config_search_path=path)


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException:
            hint = "Write key=value; quote values that hold spaces, commas or brackets."
            problems.append(
                Problem(text, "cannot be read as an override.", COMMAND_LINE, hint=hint)
            )
    if problems:
        raise ConfigError(problems)
    return parsed


def _with_only_project(
    loader: ConfigLoaderImpl, overrides: list[Override], directory: Path
) -> list[Override]:
    """Choose the project when there is but one."""
    options = loader.get_group_options("project")
    if not options:
        hint = "Make one with `mlops-ray init NAME`, or go to a project's folder with -C DIR."
        raise ConfigError(
            [Problem("project", "there is no configs/project/*.yaml.", str(directory), hint=hint)]
        )
    if any(override.key_or_group == "project" for override in overrides):
        return overrides
    return overrides if len(options) != 1 else _parse([f"project={options[0]}"]) + overrides


def _lenient(loader: ConfigLoaderImpl, override: Override) -> str:
    line = str(override.input_line)
    group = override.key_or_group
    is_value = override.type == OverrideType.CHANGE and override.package is None
    if is_value and not loader.repository.group_exists(group) and not group.startswith("hydra"):
        return f"++{line}"
    return line


def _plain(config: DictConfig, origins: dict[str, Origin]) -> dict[str, Any]:
    with open_dict(config):
        config.pop("hydra", None)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        values = None if missing else OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError([_located(key, str(error).splitlines()[0], origins)]) from error
    if missing:
        required = "a value is required (it is ???)."
        raise ConfigError([_located(key, required, origins) for key in missing])
    return {str(key): value for key, value in dict(values or {}).items()}  # type: ignore[arg-type]


def _located(key: str, message: str, origins: dict[str, Origin]) -> Problem:
    file, line = Composed({}, origins).origin(key)
    return Problem(key, message, file, line)


def _origins(loader: ConfigLoaderImpl, defaults: list[Any], directory: Path) -> dict[str, Origin]:
    """Map each dotted path to the file and line that set it last, in Hydra's order of merging."""
    origins: dict[str, Origin] = {}
    for default in defaults:
        path = _source_file(loader, default.config_path)
        if path is None:
            continue
        name = str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)
        with path.open(encoding="utf-8") as stream:
            node = yaml.compose(stream, Loader=yaml.SafeLoader)
        prefix = [part for part in (default.package or "").split(".") if part != "_global_"]
        _walk(node, [part for part in prefix if part], name, origins)
    return origins


def _source_file(loader: ConfigLoaderImpl, config_path: str | None) -> Path | None:
    if config_path is None:
        return None
    for source in loader.get_sources():
        if source.scheme() == "file":
            file = Path(source.path) / f"{config_path}.yaml"
            if file.is_file():
                return file
    return None


def _names(loader: ConfigLoaderImpl, workflows: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for option in workflows:
        file = _source_file(loader, f"workflow/{option}")
        found = file and _NAME.search(file.read_text(encoding="utf-8"))
        if found:
            yield option, found[1]


def _walk(node: Any, path: list[str], file: str, origins: dict[str, Origin]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = [*path, str(key.value)]
            origins[".".join(here)] = (file, key.start_mark.line + 1)
            _walk(value, here, file, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            here = [*path, str(index)]
            origins[".".join(here)] = (file, item.start_mark.line + 1)
            _walk(item, here, file, origins)


def _hydra_problem(error: HydraException, loader: ConfigLoaderImpl) -> Problem:
    """Say what Hydra says, shorter, with the options that were meant."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[:4]).replace("'++", "'") or str(
        error.__cause__ or type(error).__name__
    )
    missing = getattr(error, "missing_cfg_file", None)
    hint = ""
    if isinstance(missing, str) and "/" in missing:
        group, _, name = missing.rpartition("/")
        options = loader.get_group_options(group)
        close = difflib.get_close_matches(name, options, n=1)
        message = f"there is no {group} named {name!r}."
        hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(options)}."
        return Problem(group, message, COMMAND_LINE, hint=hint)
    return Problem(_PRIMARY, message, COMMAND_LINE)


def _yaml_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    text = str(getattr(error, "problem", None) or error)
    if mark is None:
        return Problem(_PRIMARY, text)
    return Problem(_PRIMARY, text, str(mark.name), int(mark.line) + 1)
