"""The key of a step: a digest of its code, its configuration, its inputs, its environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlops_ray.config import signatures
from mlops_ray.config.workflow import Environment, Step
from mlops_ray.metadata.digest import (
    digest_bytes,
    digest_file,
    digest_files,
    digest_json,
    tree_files,
)
from mlops_ray.orchestration import references
from mlops_ray.orchestration.annotations import Annotations
from mlops_ray.orchestration.compatibility import paths_in
from mlops_ray.orchestration.references import Reference
from mlops_ray.orchestration.symbols import Code, code_of

_WITH_PATHS = ("pip", "uv", "conda", "py_modules", "working_dir")
_PASSED_OVER = re.compile(r"(^|/)(\.|__pycache__/)")


@dataclass(frozen=True)
class StepKey:
    """A cache key, and what it was made of, so that one can say what changed.

    ``parts``: ``target``, the function; ``code``, the digest of each definition that it reaches;
    ``inputs``, for each parameter ``{"config": value}`` or ``{"step": name, "digest": …}`` (of a part
    of an output also ``part``, and ``value`` instead of the digest), by dotted path where a
    parameter mixes both; ``environment``, with ``files``, the digests of those that the inputs name.
    ``base`` is the digest of all but what is mapped over.
    """

    key: str
    parts: dict[str, Any]
    base: str


@dataclass(frozen=True)
class Given:
    """What a reference stands for: as it counts for the key, and as ``why`` shows it."""

    counts: Any
    shown: dict[str, Any]


def step_key(step: Step, given: Callable[[Reference], Given], packages: tuple[str, ...]) -> StepKey:
    """Return the key of a step.

    Args:
        step: The step, flattened: its references name steps.
        given: What a reference stands for.
        packages: Packages whose code counts.
    """
    assert step.uses is not None
    code = code_with_inputs(step.uses, step.inputs, packages)
    environment = environment_of(step.environment)
    files = _files_given(step, packages)
    if files:
        environment["files"] = files
    material = {
        "target": step.uses,
        "code": code.digest,
        "inputs": references.replace(step.inputs, lambda reference: given(reference).counts),
        "environment": environment,
    }
    base = key = digest_json(material)
    if step.map:
        mapped = references.replace(step.map, lambda reference: given(reference).counts)
        key = digest_json({"base": base, "map": mapped})
    parts = {
        "target": step.uses,
        "code": dict(code.symbols),
        "inputs": dict(_shown({**step.inputs, **step.map}, given)),
        "environment": environment,
    }
    return StepKey(key, parts, base)


def item_key(parent: StepKey, elements: Mapping[str, Any]) -> StepKey:
    """Return the key of one call of a mapped step.

    Args:
        parent: The step's key.
        elements: What each mapped parameter gets, as it counts: digests or plain values. Equal calls
            have one key, whatever else is in the lists.
    """
    given = dict(elements)
    key = digest_json({"base": parent.base, "elements": given})
    return StepKey(key, {"call_of": parent.key, "elements": given}, parent.base)


def code_digest(target: str, inputs: Any, packages: Iterable[str]) -> str:
    """Digest the definitions that a function reaches inside ``packages``, and those that its inputs
    mention by dotted name. Comments and formatting do not count; docstrings do."""
    return code_with_inputs(target, inputs, tuple(packages)).digest


def code_with_inputs(target: str, inputs: Any, packages: tuple[str, ...]) -> Code:
    """Return the code that a function reaches together with that of the names in its inputs."""
    named = dict.fromkeys([target, *_dotted_names(inputs, packages)])
    return code_of(tuple(named), packages)


def environment_of(environment: Environment) -> dict[str, Any]:
    """Return what of the environment counts: Python, the declared packages, variables, runtime.

    Of variables only digests are kept, since they may be secrets. Files and folders that the runtime
    environment names (``requirements.txt``, ``py_modules``) count with what they hold.
    """
    found: dict[str, Any] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    if environment.packages:
        found["packages"] = {name: _installed(name) for name in environment.packages}
    if environment.variables:
        found["variables"] = {name: _value_digest(name) for name in environment.variables}
    if environment.runtime:
        found["runtime"] = {n: _runtime_part(n, v) for n, v in environment.runtime.items()}
    return found


def _runtime_part(name: str, value: Any) -> Any:
    if name == "env_vars" and isinstance(value, dict):
        return {variable: digest_bytes(str(text).encode()) for variable, text in value.items()}
    return _with_contents(value) if name in _WITH_PATHS else value


def _with_contents(value: Any) -> Any:
    """Return a value with the digest of what it holds in the place of each path."""
    if isinstance(value, dict):
        return {name: _with_contents(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_contents(item) for item in value]
    # The last word: a requirement may be "-r requirements.txt".
    path = Path(value.split()[-1]) if isinstance(value, str) and value.strip() else None
    if path is None or not path.exists():
        return value
    return {"path": value, "digest": _tree_digest(path)}


def _tree_digest(path: Path) -> str:
    """Return the digest of a file, or of a folder without what is hidden or compiled in it."""
    if path.is_file():
        return digest_file(path)
    names = [name for name in tree_files(path) if not _PASSED_OVER.search(name)]
    return digest_files({name: digest_file(path / name) for name in names})


def _files_given(step: Step, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the digests of the files that the configuration names to a pure step, as paths.

    An effect may write what it is given, and is not to be repeated for that.
    """
    assert step.uses is not None
    inputs = step.inputs.items() if step.mode == "pure" else ()
    named = {n: value for n, value in inputs if any(map(os.path.isfile, _texts(value)))}
    signature = signatures.find(step.uses) if named else None
    if signature is None:
        return {}
    annotations = Annotations(packages)
    taken = {name: annotations.takes(signature, name) for name in named}
    paths = sorted({path for name, value in named.items() for path in paths_in(value, taken[name])})
    return {path: digest_file(Path(path)) for path in paths if os.path.isfile(path)}


@lru_cache(maxsize=1024)
def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _value_digest(name: str) -> str | None:
    value = os.environ.get(name)
    return None if value is None else digest_bytes(value.encode())


def _dotted_names(value: Any, packages: tuple[str, ...]) -> Iterator[str]:
    """Yield the names in our packages that texts mention, ``package.module:name`` too."""
    if not packages:
        return
    pattern = rf"(?<![\w./$-])(?:{'|'.join(map(re.escape, packages))})(?:[.:]\w+)+"
    for text in _texts(value):
        yield from (found.replace(":", ".") for found in re.findall(pattern, text))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts inside a value, also those that are keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _shown(
    value: Any, given: Callable[[Reference], Given], path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield path and origin of each input, cut up only where it mixes values and references."""
    reference = references.parse(value)
    if reference is not None:
        yield path, given(reference).shown
    elif path and next(references.find(value), None) is None:
        yield path, {"config": value}
    else:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _shown(item, given, f"{path}.{key}" if path else str(key))
