"""Nested workflows made flat: the steps inside become ``outer/inner``, with the inputs put in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import Problem
from mlops_ray.orchestration import conditions, references
from mlops_ray.orchestration.conditions import Condition, ConditionError, Constant
from mlops_ray.orchestration.references import Reference

INPUTS = "inputs"
_OF_FUNCTIONS = ("mode", "idempotent", "retries", "timeout", "resources", "environment", "pickle")


@dataclass
class FlatStep:
    """A step with all references in their flat form, and where it is declared (a dotted path)."""

    step: Step
    path: str
    conditions: tuple[Condition, ...]
    after: frozenset[str]

    def references(self) -> Iterator[Reference]:
        """Yield what the step needs: in its inputs, what it maps over, its conditions."""
        yield from references.find(self.step.inputs)
        yield from references.find(self.step.map)
        yield from self.asked()

    def asked(self) -> Iterator[Reference]:
        """Yield what the conditions ask for."""
        yield from (c.operand for c in self.conditions if isinstance(c.operand, Reference))


@dataclass
class Flat:
    """A flat workflow: steps by name; by scope what it gives and how many tasks may run at once.

    Scopes are ``""``, the whole, and ``outer``, the steps inside ``outer``; ``paths`` say where they
    are declared. ``unused`` are paths of inputs that nothing asks for. ``problems`` are all that was
    found; what they concern is None in the steps.
    """

    steps: dict[str, FlatStep] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def flatten(workflow: Workflow) -> Flat:
    """Flatten a workflow. Problems are collected, not raised."""
    flat = Flat()
    _Scope(workflow, "workflow", "", None, {}, (), frozenset(), 0, None, flat).enter()
    return flat


class _UnresolvedError(Exception):
    """A reference leads nowhere: what is wrong, and what may have been meant instead."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


@dataclass
class _Scope:
    """One workflow at its place: the whole one, or one nested in a step of ``parent``."""

    workflow: Workflow
    path: str
    name: str
    parent: _Scope | None
    given: dict[str, Any]
    conditions: tuple[Condition, ...]
    after: frozenset[str]
    priority: int
    limit: int | None
    flat: Flat
    children: dict[str, _Scope] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def enter(self) -> None:
        """Add this workflow's steps to the flat one."""
        self._prepare()
        self._fill()

    def _prepare(self) -> None:
        """Make the scopes of all nested workflows, so that references find them in any order."""
        self.flat.paths[self.name] = self.path
        limits = [n for n in (self.limit, self.workflow.max_parallel) if n is not None]
        if limits:
            self.flat.limits[self.name] = min(limits)
        self._check_inputs()
        if not self.workflow.steps:
            self._problem(f"{self.path}.steps", f"workflow {self.workflow.name!r} has no steps.")
        for name, step in self.workflow.steps.items():
            if not name.isidentifier() or name == INPUTS:
                what = f"{name!r} cannot be the name of a step."
                self._problem(f"{self._at(name)}", what, "Take letters, digits and _.")
            if step.workflow is not None:
                child = _Scope(
                    step.workflow, f"{self._at(name)}.workflow", self._flat(name), self,
                    step.inputs, (), frozenset(), self.priority + step.priority,
                    step.max_parallel, self.flat,
                )  # fmt: skip
                self.children[name] = child
                child._prepare()

    def _fill(self) -> None:
        for name, step in self.workflow.steps.items():
            path = self._at(name)
            held = (*self.conditions, *self._condition(step, path))
            after = self.after | self._after(step, path)
            if name in self.children:
                self._check_nested(step, path)
                for parameter, value in step.inputs.items():
                    self._value(value, f"{path}.with.{parameter}")
                child = self.children[name]
                child.conditions, child.after = held, after
                child._fill()
            else:
                self._add(name, step, path, held, after)
        self.flat.outputs[self.name] = {
            name: self._value(text, f"{self.path}.outputs.{name}")
            for name, text in self.workflow.outputs.items()
        }
        unused = [name for name in self.workflow.inputs if name not in self.asked]
        self.flat.unused += [f"{self.path}.inputs.{name}" for name in unused]

    def _add(
        self, name: str, step: Step, path: str, held: tuple[Condition, ...], after: frozenset[str]
    ) -> None:
        mapped = {p: self._mapped(text, f"{path}.map.{p}") for p, text in step.map.items()}
        for parameter in sorted(set(mapped) & set(step.inputs)):
            self._problem(f"{path}.map.{parameter}", "is given under 'with' already.")
        changes = {
            "inputs": {p: self._value(v, f"{path}.with.{p}") for p, v in step.inputs.items()},
            "map": {parameter: text for parameter, text in mapped.items() if text is not None},
            "when": " and ".join(map(str, held)) or None,
            "after": tuple(sorted(after)),
            "priority": self.priority + step.priority,
            "group": self._flat(step.group) if step.group else None,
        }
        flat = FlatStep(step.model_copy(update=changes), path, held, after)
        self.flat.steps[self._flat(name)] = flat

    # References

    def _value(self, value: Any, path: str) -> Any:
        """Return a declared value with references made flat; what is wrong becomes None."""
        reference = references.parse(value)
        if reference is not None:
            try:
                return _text(self._resolve(reference, ()))
            except _UnresolvedError as found:
                self._problem(path, found.what, found.hint)
                return None
        if references.is_mistaken(value):
            hint = f"One is written $step.part.0; the text itself is written ${value}."
            self._problem(path, f"{value!r} is not a reference.", hint)
            return None
        if isinstance(value, dict):
            return {key: self._value(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item, f"{path}.{index}") for index, item in enumerate(value)]
        return value

    def _mapped(self, text: str, path: str) -> str | None:
        before = len(self.flat.problems)
        value = self._value(text, path)
        if references.parse(value) is None:
            if len(self.flat.problems) == before:
                self._problem(path, f"{text!r} is not the output of a step.", "Write $step.")
            return None
        return str(value)

    def _resolve(self, reference: Reference, trail: tuple[tuple[str, Reference], ...]) -> Any:
        """Return the flat ``Reference`` that a reference stands for, or a plain value.

        Raises:
            _UnresolvedError: It leads nowhere, or in a circle.
        """
        here = (self.name, reference)
        if here in trail:
            raise _UnresolvedError(f"{reference} is given to itself.")
        trail = (*trail, here)
        if reference.step == INPUTS:
            return self._input(reference, trail)
        if reference.step in self.children:
            return self._output(reference, trail)
        if reference.step in self.workflow.steps:
            return Reference(self._flat(reference.step), reference.path)
        raise _UnresolvedError(
            f"there is no step {reference.step!r}.",
            _meant(reference.step, self.workflow.steps, "$", "Steps are"),
        )

    def _input(self, reference: Reference, trail: tuple[tuple[str, Reference], ...]) -> Any:
        known = self.workflow.inputs
        if not reference.path or reference.path[0] not in known:
            name = reference.path[0] if reference.path else ""
            what = f"the workflow has no input {name!r}." if name else "name one of the inputs."
            raise _UnresolvedError(what, _meant(name, known, "$inputs.", "Its inputs are"))
        name, *rest = reference.path
        self.asked.add(name)
        if name not in self.given or self.parent is None:
            return _part(known[name], tuple(rest), reference)
        return _part(self.parent._substitute(self.given[name], trail), tuple(rest), reference)

    def _output(self, reference: Reference, trail: tuple[tuple[str, Reference], ...]) -> Any:
        child = self.children[reference.step]
        known = child.workflow.outputs
        if not reference.path or reference.path[0] not in known:
            name = reference.path[0] if reference.path else ""
            what = f"{reference.step!r} is a workflow and "
            what += f"has no output {name!r}." if name else "has outputs by name."
            hint = _meant(name, known, f"${reference.step}.", "Its outputs are")
            raise _UnresolvedError(what, hint if known else "Declare it under its 'outputs'.")
        name, *rest = reference.path
        return _part(child._substitute(known[name], trail), tuple(rest), reference)

    def _substitute(self, value: Any, trail: tuple[tuple[str, Reference], ...]) -> Any:
        reference = references.parse(value)
        if reference is not None:
            return self._resolve(reference, trail)

        def resolve(inner: Reference) -> Any:
            return _text(self._resolve(inner, trail))

        return references.replace(value, resolve, keep_escapes=True)

    def _condition(self, step: Step, path: str) -> tuple[Condition, ...]:
        if step.when is None:
            return ()
        try:
            condition = conditions.parse(step.when)
            assert isinstance(condition.operand, Reference)
            value = self._resolve(condition.operand, ())
        except ConditionError as error:
            self._problem(f"{path}.when", f"{error}.")
            return ()
        except _UnresolvedError as found:
            self._problem(f"{path}.when", found.what, found.hint)
            return ()
        if not isinstance(value, Reference):
            return (condition.on(Constant(references.replace(value, str))),)
        return (condition.on(value),)

    def _after(self, step: Step, path: str) -> frozenset[str]:
        found: set[str] = set()
        for index, other in enumerate(step.after):
            if other in self.children:
                found |= set(self.children[other]._leaves())
            elif other in self.workflow.steps:
                found.add(self._flat(other))
            else:
                hint = _meant(other, self.workflow.steps, "", "Steps are")
                self._problem(f"{path}.after.{index}", f"there is no step {other!r}.", hint)
        return frozenset(found)

    def _leaves(self) -> Iterator[str]:
        for name in self.workflow.steps:
            if name in self.children:
                yield from self.children[name]._leaves()
            else:
                yield self._flat(name)

    # What may be declared

    def _check_inputs(self) -> None:
        for name, default in self.workflow.inputs.items():
            path = f"{self.path}.inputs.{name}"
            if any(references.find(default)):
                self._problem(path, "the default of an input cannot refer to a step.")
            else:
                self._value(default, path)
            if default is None and name not in self.given and self.parent is not None:
                self._problem(self._outer("with"), f"the workflow needs input {name!r}.")
            elif default is None and self.parent is None:
                self._problem(path, "the workflow that is run needs a value for its input.")
        for name in self.given:
            if name not in self.workflow.inputs:
                hint = _meant(name, self.workflow.inputs, "", "Its inputs are")
                self._problem(self._outer(f"with.{name}"), "the workflow has no such input.", hint)

    def _check_nested(self, step: Step, path: str) -> None:
        for name in _OF_FUNCTIONS:
            if name in step.model_fields_set:
                hint = "Give it to the steps inside."
                self._problem(f"{path}.{name}", "is for functions, not for workflows.", hint)

    def _outer(self, key: str) -> str:
        return f"{self.path.removesuffix('.workflow')}.{key}"

    def _at(self, name: str) -> str:
        return f"{self.path}.steps.{name}"

    def _flat(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name

    def _problem(self, path: str, what: str, hint: str = "") -> None:
        self.flat.problems.append(Problem(path, what, hint=hint))


def _part(value: Any, path: tuple[str, ...], reference: Reference) -> Any:
    for index, name in enumerate(path):
        if isinstance(value, Reference):
            return Reference(value.step, value.path + path[index:])
        try:
            value = references.select(value, (name,))
        except KeyError as error:
            raise _UnresolvedError(f"{reference}: what is given has no part {name!r}.") from error
        value = references.parse(value) or value
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Reference) else value


def _meant(name: str, known: Iterable[str], prefix: str, title: str) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1) if name else []
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"{title}: {', '.join(names)}." if names else ""
