"""Declaring workflows in Python: the same model, with the same checks, as in YAML.

with workflow("nightly") as nightly:
    table = nightly.step("load", load, path="orders.csv")
    model = nightly.step("fit", fit, data=table, retries=2)
    nightly.step("score", score, model=model, map={"part": table.parts})
    nightly.outputs(model=model)
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pydantic import ValidationError

from mlops_ray.config.check import Declared, check_declared
from mlops_ray.config.compose import Composed, Origin
from mlops_ray.config.targets import load
from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import ConfigError, Problem, WorkflowError
from mlops_ray.metadata.digest import canonical_json
from mlops_ray.orchestration.checks import check_workflow
from mlops_ray.orchestration.references import Reference

_OPTIONS = frozenset(Step.model_fields) - {"uses", "workflow", "inputs", "map"}


class Output:
    """What a step gives, or a part of it: ``gate.passed``, ``report["auc"]``, ``parts[0]``.

    As text it is the reference that YAML writes, so a condition reads ``when=f"{report.auc} >= 0.7"``.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def __getattr__(self, name: str) -> Output:
        """Return a part of the output."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, part: str | int) -> Output:
        """Return a part of the output."""
        return Output(Reference(self._reference.step, (*self._reference.path, str(part))))

    def __iter__(self) -> None:
        """Refuse: how long an output is shows only when the workflow runs."""
        raise TypeError(f"{self} is not known yet; use map={{…}} to call a step for each element")

    def __bool__(self) -> bool:
        """Refuse: what an output is shows only when the workflow runs."""
        raise TypeError(f'{self} is not known yet; give the step when="{self}"')

    def __str__(self) -> str:
        return str(self._reference)

    __repr__ = __str__


class Declaration:
    """A workflow that is being declared; see ``workflow``."""

    def __init__(self, name: str, description: str, max_parallel: int | None) -> None:
        self._values: dict[str, Any] = {"name": name, "inputs": {}, "outputs": {}, "steps": {}}
        self._values |= {"description": description, "max_parallel": max_parallel}
        self._origins: dict[str, Origin] = {}
        self._problems: list[Problem] = []
        self._workflow: Workflow | None = None

    @property
    def workflow(self) -> Workflow:
        """The finished workflow.

        Raises:
            ConfigError: It has problems; each is said with the file and line that declares it.
        """
        if self._workflow is None:
            self._workflow = self._finish()
        return self._workflow

    @property
    def origins(self) -> Mapping[str, Origin]:
        """File and line of each dotted path that was declared."""
        return self._origins

    def input(self, name: str, default: Any = None) -> Output:
        """Declare what the workflow is given where it is nested; without a default it is required."""
        self._place(f"workflow.inputs.{name}", inspect.currentframe())
        self._values["inputs"][name] = _plain(default)
        return Output(Reference("inputs", (name,)))

    def step(
        self,
        name: str,
        uses: Callable[..., Any] | Workflow | Declaration,
        given: Mapping[str, Any] | None = None,
        /,
        *,
        map: Mapping[str, Output] | None = None,
        **options: Any,
    ) -> Output:
        """Declare a step and return its output.

        Args:
            name: The step's name.
            uses: A function at the top of a module, or a workflow to nest.
            given: Inputs whose names are those of options.
            map: Parameters that get one element of a list at a time.
            options: Inputs of the function, and the options that a step has in YAML: ``after``,
                ``when``, ``mode``, ``retries``, ``timeout``, ``resources`` and the others.
        """
        path = f"workflow.steps.{name}"
        self._place(path, inspect.currentframe())
        if name in self._values["steps"]:
            self._problem(path, "there is a step of this name already.")
        inputs = {key: value for key, value in options.items() if key not in _OPTIONS}
        made: dict[str, Any] = {"with": _plain({**inputs, **(given or {})})}
        made |= {key: _option(key, value) for key, value in options.items() if key in _OPTIONS}
        if map is not None:
            made["map"] = _plain(dict(map))
        self._values["steps"][name] = made | self._target(uses, path)
        return Output(Reference(name))

    def outputs(self, **outputs: Output) -> None:
        """Declare what the workflow gives."""
        for name, output in outputs.items():
            self._place(f"workflow.outputs.{name}", inspect.currentframe())
            self._values["outputs"][name] = str(output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            _ = self.workflow

    def _target(self, uses: Any, path: str) -> dict[str, Any]:
        if isinstance(uses, Workflow | Declaration):
            nested, origins = declared(uses)
            self._origins |= {f"{path}.{key}": origin for key, origin in origins.items()}
            return {"workflow": nested}
        module, name = getattr(uses, "__module__", ""), getattr(uses, "__qualname__", "")
        found = getattr(sys.modules.get(module), name, None)
        if module == "__main__" or found is not uses:
            hint = "Put it at the top of a module that workers can import."
            self._problem(path, f"{name or uses!r} cannot be a step's function.", hint)
        return {"uses": f"{module}.{name}"}

    def _finish(self) -> Workflow:
        if self._problems:
            raise ConfigError(self._problems)
        try:
            made = Workflow.model_validate(self._values)
        except ValidationError as error:
            raise ConfigError([self._invalid(item) for item in error.errors()]) from error
        if None in made.inputs.values():
            return made  # what it is given is known, and checked, where it is nested
        packages = sorted({target.partition(".")[0] for target in _targets(self._values)})
        values = {"allow": packages, "workflow": self._values}
        check_declared(Composed(values, self._origins), check_workflow)
        return made

    def _invalid(self, item: Any) -> Problem:
        path = ".".join(["workflow", *(str(part) for part in item["loc"])])
        file, line = Composed({}, self._origins).origin(path)
        return Problem(path, f"{item['msg'].removeprefix('Value error, ')}.", file, line)

    def _problem(self, path: str, what: str, hint: str = "") -> None:
        self._problems.append(Problem(path, what, *self._origins[path], hint))

    def _place(self, path: str, frame: FrameType | None) -> None:
        """Remember the line that called the method whose frame this is."""
        caller = frame.f_back if frame is not None else None
        if caller is not None:
            file = Path(caller.f_code.co_filename)
            shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            self._origins[path] = (str(shown), caller.f_lineno)


def workflow(name: str, *, description: str = "", max_parallel: int | None = None) -> Declaration:
    """Begin a workflow. Leaving the ``with`` block checks it.

    Raises:
        ConfigError: From the end of the block: every problem, with the file and line that declares it.
    """
    return Declaration(name, description, max_parallel)


def declared(made: Workflow | Declaration) -> Declared:
    """Return a workflow's values and the origins of its paths.

    Raises:
        ConfigError: The declaration has problems.
    """
    origins = dict(made.origins) if isinstance(made, Declaration) else {}
    finished = made.workflow if isinstance(made, Declaration) else made
    return finished.model_dump(mode="json", by_alias=True, exclude_unset=True), origins


def declared_by(target: str, config: dict[str, Any]) -> Declared:
    """Return the values and origins of a workflow that a dotted name declares: a declaration, a
    workflow, or a function that makes one of the composed configuration.

    Raises:
        ConfigError: The declaration has problems.
        MlopsRayError: There is nothing of that name.
        WorkflowError: It is something else.
    """
    found = load(target)
    if callable(found):
        found = found(config)
    if not isinstance(found, Workflow | Declaration):
        raise WorkflowError(
            f"{target} declares no workflow",
            why=f"it is a {type(found).__name__}",
            fix="name what `with mlops_ray.workflow(…) as name` has made, or a function returning it",
        )
    return declared(found)


def _plain(value: Any) -> Any:
    """Return a value as YAML would give it: outputs as references, models as their JSON."""
    if isinstance(value, Output):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return json.loads(canonical_json(value))


def _option(name: str, value: Any) -> Any:
    if name == "after":
        steps = [value] if isinstance(value, str | Output) else list(value)
        return [str(step).removeprefix("$") for step in steps]
    return str(value) if name == "when" and value is not None else _plain(value)


def _targets(values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for step in values["steps"].values():
        nested = step.get("workflow")
        found += _targets(nested) if nested is not None else [step["uses"]]
    return found
