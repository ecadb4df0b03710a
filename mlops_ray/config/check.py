"""The schema's part: a composed dict in, one frozen ``Project`` out, or every problem at once."""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlops_ray.config import signatures
from mlops_ray.config.compose import Composed, Origin, compose
from mlops_ray.config.locate import Workspace, default_home
from mlops_ray.config.project import Project
from mlops_ray.config.trigger_check import trigger_problems
from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import ConfigError, Problem

OWN_PACKAGE = "mlops_ray"
_TARGET_KEYS = ("_target_", "uses", "read", "clean", "function", "check")
_INPUT_KEYS = ("_target_",)
_TARGET_PATHS = re.compile(
    r"model\.target|serving\.autoscaling\.policy|serving\.graph\.(before|after)\.\d+"
)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_GIVEN_BY_TRAINER = frozenset({"num_numeric", "cardinalities"})
_GIVEN_BY_RUN = frozenset({"context"})


@dataclass
class Findings:
    """Problems, with which nothing can run, and warnings."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


Declared = tuple[dict[str, Any], dict[str, Origin]]
"""A workflow that was declared in Python: its values, and the origin of each dotted path."""

Declare = Callable[[str, dict[str, Any]], Declared]
"""Makes a workflow of the dotted name of its declaration in Python and the composed configuration."""

WorkflowCheck = Callable[[Workflow, tuple[str, ...]], Findings]
"""Checks a workflow given the packages that dotted names may point into; see ``orchestration``."""


def check_project(
    workspace: Workspace,
    overrides: list[str],
    check_workflow: WorkflowCheck,
    declare: Declare,
    given: Declared | None = None,
) -> tuple[Project, list[Problem]]:
    """Compose and check a project; return it with warnings.

    A workflow that says ``declared_by: package.module.name`` is taken from there; one that is
    ``given`` takes the place of the configured one.

    Raises:
        ConfigError: With every problem found: unknown keys, wrong types and values, dotted names
            that are not allowed or do not exist, arguments that a step or model does not take, what
            ``check_workflow`` finds.
    """
    composed = compose(workspace, overrides)
    values = composed.values
    if values.get("home") is None:
        values["home"] = str(default_home())
    workspace.import_roots()
    given = given or _declared(composed, declare)
    if given is not None:
        values = {**composed.values, "workflow": given[0]}
        composed = replace(composed, values=values, origins={**composed.origins, **given[1]})
    problems = [*_target_problems(composed), *_call_problems(composed)]
    project = None
    try:
        project = Project.model_validate(composed.values)
    except ValidationError as error:
        problems += _schema_problems(error, composed)
    if project is not None:
        problems += _reference_problems(project, composed)
        problems += trigger_problems(project, composed)
    found = _workflow_findings(composed, check_workflow)
    problems += found.problems
    if problems:
        raise ConfigError(sorted(problems, key=lambda problem: (problem.file, problem.line or 0)))
    assert project is not None
    return project, found.warnings


def _declared(composed: Composed, declare: Declare) -> Declared | None:
    """Return the workflow that is declared in Python, where the configuration names one."""
    values, path = composed.values, "workflow.declared_by"
    given = values.get("workflow")
    if not isinstance(given, dict) or "declared_by" not in given:
        return None
    target, packages = str(given["declared_by"]), allowed_packages(values)
    others = sorted(set(given) - {"declared_by"})
    what = hint = ""
    if others:
        what = f"{', '.join(others)} cannot be given beside it."
    elif not is_allowed(target, packages):
        what = f"{target!r} is not on the allow-list."
        hint = f"Allowed are: {', '.join(packages)}. Add its package to 'allow' to trust it."
    if what:
        raise ConfigError([Problem(path, what, *composed.origin(path), hint)])
    return declare(target, values)


def check_declared(composed: Composed, check_workflow: WorkflowCheck) -> None:
    """Check a workflow that was declared in Python. ``composed`` holds it as values, with the packages
    that its functions are in and the origin of each path.

    Raises:
        ConfigError: With every problem found.
    """
    problems = [*_target_problems(composed), *_call_problems(composed)]
    problems += _workflow_findings(composed, check_workflow).problems
    if problems:
        raise ConfigError(sorted(problems, key=lambda problem: (problem.file, problem.line or 0)))


def _workflow_findings(composed: Composed, check_workflow: WorkflowCheck) -> Findings:
    """Check the workflow, whatever is wrong with the rest of the configuration."""
    try:
        workflow = Workflow.model_validate(composed.values.get("workflow"))
    except ValidationError:
        return Findings()  # the schema's problems say so
    found = check_workflow(workflow, tuple(allowed_packages(composed.values)))

    def place(problem: Problem) -> Problem:
        file, line = composed.origin(problem.path)
        return replace(problem, file=file, line=line)

    return Findings([*map(place, found.problems)], [*map(place, found.warnings)])


def allowed_packages(values: dict[str, Any]) -> list[str]:
    """Return the packages that dotted names may point into."""
    extra = values.get("allow") or []
    named = [values.get("package"), *(extra if isinstance(extra, list) else [])]
    return [OWN_PACKAGE, *(name for name in named if isinstance(name, str))]


def is_allowed(target: str, packages: Iterable[str]) -> bool:
    """Say whether a dotted name lies in one of the packages."""
    return any(target.startswith(f"{package}.") for package in packages)


def _target_problems(composed: Composed) -> Iterator[Problem]:
    packages = allowed_packages(composed.values)
    seen: set[str] = set()
    for path, target in _targets(composed.values):
        if target in seen:
            continue  # inputs of steps repeat what other sections say
        seen.add(target)
        file, line = composed.origin(path)
        if not is_allowed(target, packages):
            hint = f"Allowed are: {', '.join(packages)}. Add its package to 'allow' to trust it."
            yield Problem(path, f"{target!r} is not on the allow-list.", file, line, hint)
        elif signatures.find(target) is None:
            module, _, name = target.rpartition(".")
            known = signatures.names(module)
            what = f"{module} has no {name!r}." if known else f"there is no module {module!r}."
            yield Problem(path, what, file, line, _did_you_mean(name, known))


def _targets(
    value: Any, path: str = "", keys: tuple[str, ...] = _TARGET_KEYS
) -> Iterator[tuple[str, str]]:
    """Yield each dotted name that would be loaded, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            here = f"{path}.{key}" if path else str(key)
            if isinstance(item, str) and key in keys:
                if key in ("_target_", "uses") or _DOTTED.fullmatch(item):
                    yield here, item
            else:
                # What else the inputs of a step are called is its function's affair.
                is_input = key == "with" and path.startswith("workflow.steps.")
                yield from _targets(item, here, _INPUT_KEYS if is_input else keys)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _targets(item, f"{path}.{index}", keys)
    elif isinstance(value, str) and _TARGET_PATHS.fullmatch(path) and _DOTTED.fullmatch(value):
        yield path, value


def _schema_problems(error: ValidationError, composed: Composed) -> Iterator[Problem]:
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if part != "[key]"]
        path = ".".join(parts)
        file, line = composed.origin(path)
        if item["type"] == "extra_forbidden":
            known = [*_field_names(Project, parts[:-1])]
            known += composed.groups if len(parts) == 1 else ()
            yield Problem(path, "unknown key.", file, line, _did_you_mean(parts[-1], known))
        elif item["type"] == "missing":
            yield Problem(path, "a value is required here.", file, line)
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" Got {given!r}." if isinstance(given, str | int | float | bool) else ""
            yield Problem(path or "project", f"{message}.{shown}".replace("..", "."), file, line)


def _field_names(model: Any, path: list[str]) -> list[str]:
    """Return the keys that are known at ``path`` below a model."""
    for part in path:
        model = _child(model, part)
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _child(annotation: Any, part: str) -> Any:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if part in (name, field.alias):
                return _strip(field.annotation)
        return None
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _strip(arguments[1])
    return _strip(arguments[0]) if get_origin(annotation) is tuple else None


def _strip(annotation: Any) -> Any:
    """Take Optional and Annotated off."""
    if get_origin(annotation) is Annotated:
        return _strip(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        models = [a for a in get_args(annotation) if a is not type(None)]
        return _strip(models[0]) if len(models) == 1 else annotation
    return annotation


@dataclass(frozen=True)
class _Call:
    """Something that will be called: where it is declared, with what, and what is added then."""

    path: str
    target: str
    given: dict[str, Any]
    implied: frozenset[str]


def _calls(values: dict[str, Any]) -> Iterator[_Call]:
    """Yield the calls of steps and of the model."""
    yield from _step_calls(values.get("workflow"), "workflow")
    model = values.get("model")
    if isinstance(model, dict):
        arguments = {name: value for name, value in model.items() if name != "_target_"}
        yield _Call("model", str(model.get("_target_", "")), arguments, _GIVEN_BY_TRAINER)


def _step_calls(workflow: Any, path: str) -> Iterator[_Call]:
    steps = workflow.get("steps") if isinstance(workflow, dict) else None
    for name, step in (steps or {}).items():
        if not isinstance(step, dict):
            continue
        here = f"{path}.steps.{name}"
        if step.get("workflow") is not None:
            yield from _step_calls(step["workflow"], f"{here}.workflow")
        elif isinstance(step.get("with", {}), dict):
            mapped = step.get("map") or {}
            implied = _GIVEN_BY_RUN | set(mapped if isinstance(mapped, dict) else ())
            given = step.get("with") or {}
            yield _Call(f"{here}.with", str(step.get("uses", "")), given, implied)


def _call_problems(composed: Composed) -> Iterator[Problem]:
    """Check what is passed to steps and to the model against what they take."""
    packages = allowed_packages(composed.values)
    for call in _calls(composed.values):
        allowed = is_allowed(call.target, packages)
        signature = signatures.find(call.target) if allowed else None
        if signature is None or signature.open:
            continue
        takes = [name for name in signature.parameters if name not in call.implied]
        for name, value in call.given.items():
            path = f"{call.path}.{name}"
            file, line = composed.origin(path)
            if name not in takes:
                hint = _did_you_mean(name, takes) or f"{call.target} takes: {', '.join(takes)}."
                yield Problem(path, "unknown key.", file, line, hint)
            elif value is None and name in signature.never_none:
                what = f"{call.target} needs a value here, and it is null."
                yield Problem(path, what, file, line)
        for name in sorted(signature.required - set(call.given) - call.implied):
            file, line = composed.origin(call.path)
            yield Problem(call.path, f"{call.target} needs {name!r}.", file, line)


def _reference_problems(project: Project, composed: Composed) -> Iterator[Problem]:
    """Check the names by which one section refers to another."""
    name, known = project.training.service, project.features.services
    if name not in known:
        path = "training.service"
        file, line = composed.origin(path)
        hint = _did_you_mean(name, known) or f"There are: {', '.join(known)}."
        yield Problem(path, f"there is no feature service {name!r}.", file, line, hint)
    else:
        for what, hint in _redact_problems(project, name):
            path = "serving.log.redact"
            yield Problem(path, what, *composed.origin(path), hint)


def _redact_problems(project: Project, service: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the names of what is redacted, and a hint."""
    features, declared = project.features, project.features.services[service]
    views = [features.on_demand[view] for view in declared.on_demand]
    known = (
        *declared.inputs,
        *(f"{view}__{name}" for view in declared.views for name in features.views[view].features),
        *(name for view in views for name in (*view.numeric, *view.categorical)),
    )
    for name in project.serving.log.redact:
        if name == declared.time:
            yield f"{name!r} is the time of a request, which is kept as it is.", "Leave it out."
        elif name not in known:
            what = f"{name!r} is neither an input nor a feature of service {service!r}."
            yield what, _did_you_mean(name, known) or f"There are: {', '.join(known)}."


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else ""
