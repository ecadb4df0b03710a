"""What is wrong with a workflow, found before anything runs and without running any user code."""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlops_ray.config import signatures
from mlops_ray.config.check import Findings, is_allowed
from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import ConfigError, Problem
from mlops_ray.orchestration import references
from mlops_ray.orchestration.annotations import ANYTHING, NOTHING, Annotations, Kind, union
from mlops_ray.orchestration.compatibility import Compatibility, NoPart, paths_in, simple_type
from mlops_ray.orchestration.conditions import Condition
from mlops_ray.orchestration.flattening import Flat, FlatStep, flatten
from mlops_ray.orchestration.graph import graph_of
from mlops_ray.orchestration.reachability import never_runs, unused_outputs
from mlops_ray.orchestration.references import Reference
from mlops_ray.orchestration.side_effects import declared_mode, evident_effects

_ORDERING = ("<", "<=", ">", ">=")
_NUMBERS = frozenset({"int", "float", "bool"})
_RUNTIME_FIELDS = frozenset(
    {
        "config",
        "conda",
        "container",
        "env_vars",
        "excludes",
        "image_uri",
        "java_jars",
        "mpi",
        "nsight",
        "pip",
        "py_executable",
        "py_modules",
        "uv",
        "worker_process_setup_hook",
        "working_dir",
    }
)


def check_workflow(workflow: Workflow, packages: Iterable[str]) -> Findings:
    """Check a workflow: its graph, the types along its edges, what it does to the world.

    Args:
        workflow: What to check.
        packages: Packages that dotted names may point into; only their source is read.
    """
    flat = flatten(workflow)
    findings = Findings(list(flat.problems))
    checker = _Checker(flat, tuple(packages), findings)
    checker.check()
    try:
        graph = graph_of(workflow, flat)
    except ConfigError as error:
        findings.problems += error.problems
        return findings
    for place, problem in never_runs(graph):
        (findings.problems if place == "problem" else findings.warnings).append(problem)
    for place, problem in unused_outputs(graph, flat, checker.silent()):
        (findings.problems if place == "problem" else findings.warnings).append(problem)
    return findings


@dataclass
class _Checker:
    """Checks each step of a flat workflow against the functions that it and its inputs name."""

    flat: Flat
    packages: tuple[str, ...]
    findings: Findings

    def __post_init__(self) -> None:
        self._annotations = Annotations(self.packages)
        self._types = Compatibility(self._annotations)
        self._found: dict[str, signatures.Signature | None] = {}
        self._broken = tuple(problem.path for problem in self.flat.problems)

    def check(self) -> None:
        """Check all steps."""
        for name, item in self.flat.steps.items():
            signature = self._signature(item.step)
            if signature is not None:
                self._check_inputs(item, signature)
                self._check_mode(item, signature)
            self._check_parts(item)
            for condition in item.conditions:
                self._check_condition(item, condition)
            self._check_options(name, item)
        self._check_groups()
        for scope, outputs in self.flat.outputs.items():
            self._check_outputs(scope, outputs)
        for path in self.flat.unused:
            self._warn(path, "nothing inside asks for this input.")

    def silent(self) -> set[str]:
        """Return the steps that are annotated to return nothing."""
        return {name for name in self.flat.steps if self._kind(Reference(name)) == NOTHING}

    # Types along the edges

    def _check_inputs(self, item: FlatStep, signature: signatures.Signature) -> None:
        for name, value in item.step.inputs.items():
            path = f"{item.path}.with.{name}"
            if self._is_broken(path):
                continue
            taken = self._annotations.takes(signature, name)
            reference = references.parse(value)
            if reference is not None:
                self._check_fit(path, reference, self._kind(reference), taken, item)
            elif next(references.find(value), None) is None:
                literal = references.replace(value, str)
                self._check_literal(path, literal, taken)
                self._check_folder(item, path, literal, taken)
        for name, text in item.step.map.items():
            self._check_mapped(item, name, references.parse(text), signature)

    def _check_mapped(
        self,
        item: FlatStep,
        name: str,
        reference: Reference | None,
        signature: signatures.Signature,
    ) -> None:
        path = f"{item.path}.map.{name}"
        if reference is None or self._is_broken(path):
            return
        if name not in signature.parameters and not signature.open:
            hint = _meant(name, signature.parameters, f"{item.step.uses} takes")
            self._problem(path, "unknown key.", hint)
        listed = self._kind(reference)
        if not isinstance(listed, Kind):
            return
        element = self._types.element(listed)
        if element is None:
            self._problem(path, f"{reference} is not a list but {listed}: one maps over lists.")
            return
        self._check_fit(path, reference, element, self._annotations.takes(signature, name), item)

    def _check_fit(
        self, path: str, reference: Reference, given: Kind | NoPart, taken: Kind, item: FlatStep
    ) -> None:
        if isinstance(given, NoPart):
            return  # said by _check_parts
        asked = {str(condition.operand) for condition in item.conditions if not condition.negated}
        if str(reference) in asked:
            given = _without_none(given)
        fit = self._types.fit(given, taken)
        if fit == "always":
            return
        what = f"{reference} is {given}, and {item.step.uses} takes {taken}"
        if fit == "never":
            self._problem(path, f"{what}.")
        else:
            self._warn(path, f"{what}: it may not fit.")

    def _check_literal(self, path: str, value: Any, taken: Kind) -> None:
        expected = simple_type(taken)
        if expected is Any or value is None:
            return  # where null is refused, the signature's check says so
        try:
            TypeAdapter(expected).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            deeper = ".".join(str(part) for part in first["loc"] if isinstance(part, int))
            place = f"{path}.{deeper}" if deeper else path
            self._problem(place, f"{first['msg']}. Got {first['input']!r}, expected {taken}.")

    def _check_folder(self, item: FlatStep, path: str, value: Any, taken: Kind) -> None:
        if item.step.mode == "pure" and any(map(os.path.isdir, paths_in(value, taken))):
            what = "what the folder holds does not count for the key, so a change is not seen."
            self._warn(path, what, "Name a file, or make it the output of a step.")

    def _kind(self, reference: Reference) -> Kind | NoPart:
        """Return what a reference stands for."""
        producer = self.flat.steps[reference.step].step
        signature = self._signature(producer)
        kind = self._annotations.gives(signature) if signature is not None else ANYTHING
        return self._types.part(Kind("list", (kind,)) if producer.map else kind, reference.path)

    # Parts of outputs

    def _check_parts(self, item: FlatStep) -> None:
        for key, values in (("with", item.step.inputs), ("map", item.step.map)):
            for name, value in values.items():
                for path, reference in _found(value, f"{item.path}.{key}.{name}"):
                    self._check_part(path, reference)

    def _check_outputs(self, scope: str, outputs: dict[str, Any]) -> None:
        for name, value in outputs.items():
            for path, reference in _found(value, f"{self.flat.paths[scope]}.outputs.{name}"):
                self._check_part(path, reference)

    def _check_part(self, path: str, reference: Reference) -> None:
        kind = self._kind(reference)
        if not isinstance(kind, NoPart):
            return
        what = f"{reference}: {kind.kind} has no part {kind.part!r}."
        prefix = str(Reference(reference.step, reference.path[: reference.path.index(kind.part)]))
        self._problem(path, what, _meant(kind.part, kind.known, "It has", f"{prefix}."))

    def _check_condition(self, item: FlatStep, condition: Condition) -> None:
        if not isinstance(condition.operand, Reference):
            return
        path = f"{item.path}.when"
        self._check_part(path, condition.operand)
        kind = self._kind(condition.operand)
        if not isinstance(kind, Kind):
            return
        categories = {self._types.category(member) for member in kind.members()}
        mapped = self.flat.steps[condition.operand.step].step.map and not condition.operand.path
        if mapped or categories <= {"table", "path"}:
            self._problem(path, f"{condition.operand} is {kind}: a condition asks for JSON values.")
        elif condition.operator in _ORDERING and "?" not in categories:
            wanted = {"str"} if isinstance(condition.literal, str) else _NUMBERS
            if not categories & (wanted | {"literal"}):
                self._problem(path, f"{condition.operand} is {kind}: {condition} has no answer.")

    # What a step does, and where

    def _check_mode(self, item: FlatStep, signature: signatures.Signature) -> None:
        if isinstance(signature.node, ast.AsyncFunctionDef):
            hint = "Write a function that calls asyncio.run."
            self._problem(f"{item.path}.uses", f"{item.step.uses} is asynchronous.", hint)
        if item.step.mode != "pure":
            return
        declared = declared_mode(self._annotations.decorators(signature))
        if declared is not None:
            self._problem(
                f"{item.path}.uses",
                f"{item.step.uses} is marked @{declared}, and a pure step would be cached.",
                f"Set mode: {declared}.",
            )
            return
        for call, line in evident_effects(self._annotations.calls(signature)):
            what = f"{item.step.uses} calls {call} (line {line}), and a pure step would be cached."
            self._warn(f"{item.path}.uses", what, "Set mode: effect, if it changes something.")

    def _check_options(self, name: str, item: FlatStep) -> None:
        step = item.step
        if step.max_parallel is not None and not step.map:
            self._warn(f"{item.path}.max_parallel", "does nothing for a step without 'map'.")
        if not step.idempotent and step.mode != "effect":
            hint = f"Of a step of mode {step.mode} it says nothing."
            self._problem(f"{item.path}.idempotent", "is for steps of mode effect.", hint)
        if not step.idempotent and step.group is not None:
            what = "an effect that is not idempotent runs in a process of its own."
            self._problem(f"{item.path}.group", what, "Take it out of the group.")
        for key in step.environment.runtime:
            if key not in _RUNTIME_FIELDS:
                hint = _meant(key, sorted(_RUNTIME_FIELDS), "There are")
                path = f"{item.path}.environment.runtime.{key}"
                self._problem(path, "Ray's runtime environments have no such key.", hint)

    def _check_groups(self) -> None:
        groups: dict[str, list[FlatStep]] = {}
        for item in self.flat.steps.values():
            if item.step.group is not None:
                groups.setdefault(item.step.group, []).append(item)
        for group, (first, *others) in groups.items():
            for other in others:
                for key, one, two in (
                    ("environment.runtime", first.step.environment, other.step.environment),
                    ("resources.labels", first.step.resources, other.step.resources),
                ):
                    last = key.rpartition(".")[2]
                    if getattr(one, last) != getattr(two, last):
                        what = f"steps of group {group!r} share one process, and this differs from"
                        self._problem(f"{other.path}.{key}", f"{what} that of {first.path}.")

    def _signature(self, step: Step) -> signatures.Signature | None:
        assert step.uses is not None
        if step.uses not in self._found:
            allowed = is_allowed(step.uses, self.packages)
            self._found[step.uses] = signatures.find(step.uses) if allowed else None
        return self._found[step.uses]

    def _is_broken(self, path: str) -> bool:
        return any(known == path or known.startswith(f"{path}.") for known in self._broken)

    def _problem(self, path: str, what: str, hint: str = "") -> None:
        problem = Problem(path, what, hint=hint)
        if problem not in self.findings.problems:
            self.findings.problems.append(problem)

    def _warn(self, path: str, what: str, hint: str = "") -> None:
        self.findings.warnings.append(Problem(path, what, hint=hint))


def _found(value: Any, path: str) -> Iterator[tuple[str, Reference]]:
    """Yield each reference inside a value with its path."""
    reference = references.parse(value)
    if reference is not None:
        yield path, reference
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _found(item, f"{path}.{key}")


def _without_none(kind: Kind) -> Kind:
    members = [member for member in kind.members() if member != NOTHING]
    return union(members) if members else kind


def _meant(name: str, known: Iterable[str], title: str, prefix: str = "") -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"{title}: {', '.join(names)}." if names else ""
