"""Making a registered version again: the code, configuration and data of then, in a clean home.

What steps found outside or did to it are facts: outputs of steps that are not pure are taken as they
were recorded. The pure steps that lead to the version run again with an empty cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_ray.config.check import allowed_packages
from mlops_ray.config.locate import open_workspace
from mlops_ray.config.workflow import Workflow
from mlops_ray.delivery.rerun import Answer, Request, environment_of
from mlops_ray.errors import ArtifactError, MlopsRayError, RegistryError, WorkflowError
from mlops_ray.features.manifest import read_manifest
from mlops_ray.features.transplant import transplant
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import ArtifactRef, open_artifacts
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.records import RunRecord, StepRecord
from mlops_ray.metadata.redaction import redacted
from mlops_ray.metadata.source import make_source
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.orchestration.graph import Graph, build
from mlops_ray.orchestration.keys import code_with_inputs
from mlops_ray.orchestration.restriction import inputs_of, restrict

_REQUEST = "request.json"
_ANSWER = "answer.json"


@dataclass(frozen=True)
class Case:
    """What is to be made again.

    Args:
        version: The version, as the registry has it.
        weights: The digest of its weights.
        run: The run that registered it.
        step: The step of that run that did.
        graph: The steps to run, and those that are given.
        recorded: All finished steps of the run, by name.
        given: Outputs that are facts, by step.
        package: The step whose output became the version.
        metrics: The other steps whose outputs were registered with it.
    """

    version: ModelVersion
    weights: str
    run: RunRecord
    step: str
    graph: Graph
    recorded: Mapping[str, StepRecord]
    given: Mapping[str, ArtifactRef]
    package: str
    metrics: tuple[str, ...]

    @property
    def again(self) -> tuple[str, ...]:
        """The steps that run again, in order."""
        return tuple(name for name in self.graph.order if name not in self.given)

    def output(self, step: str) -> ArtifactRef:
        """Return what a step gave then."""
        ref = self.recorded[step].output
        assert ref is not None
        return ref


@dataclass(frozen=True)
class Prepared:
    """A clean home with all facts in it, and the code of then."""

    work: Path
    folder: Path
    roots: tuple[str, ...]

    @property
    def home(self) -> Home:
        """The clean home; nothing of it is on a server."""
        return Home(self.work / "home", Storage())


def find_case(home: Home, reference: str, given: Collection[str] = ()) -> Case:
    """Find out what made a version.

    Args:
        home: Where it is registered.
        reference: ``flights@7`` or ``flights@champion``.
        given: Pure steps whose outputs are to be taken as they were recorded, too.

    Raises:
        RegistryError: There is no such version, or nobody knows what made it.
        WorkflowError: A step in ``given`` is not there, or is what has to be compared.
        ArtifactError: Its package is not what was registered.
    """
    from mlops_ray.registry.registry import Registry

    version = Registry(home).resolve(reference)
    registered = packages.read(version.package)
    if registered.digest != version.digest:
        raise ArtifactError("the package is not what was registered", where=version.package)
    ledger = open_ledger(home)
    try:
        name = f"{version.name}@{version.version}"
        links = ledger.links(kind="model", name=name, direction="writes")
        found = [(run, link) for link in links if (run := ledger.run(link.run_id))]
        if not found:
            raise RegistryError(
                f"the ledger does not know what made {name}",
                where=redacted(home.ledger_url),
                fix="register it by a workflow; older versions have no record of it",
            )
        run, link = max(found, key=lambda pair: pair[0].started_at)
        steps = ledger.steps(run.run_id)
    finally:
        ledger.close()
    recorded = {step.name: step for step in steps if step.output is not None}
    whole = build(Workflow.model_validate(run.config["workflow"]))
    facts = {n for n in whole.order if whole.step(n).mode != "pure"}
    wanted = [n for n in whole.order if n in inputs_of(whole, link.step) and n not in facts]
    if compared := sorted(set(given) & set(wanted)):
        raise WorkflowError(
            f"the output of step {compared[0]} is what has to come out again",
            fix=f"give steps before: {', '.join(wanted)} are compared and have to run",
        )
    facts |= set(given)
    package = [n for n in wanted if _is_package(home, recorded[n], version)]
    if not package:
        raise RegistryError(
            f"no pure step of run {run.run_id} made the package of {name}",
            fix="only what pure steps made can be made again",
        )
    graph = restrict(whole, wanted, facts)
    needed = {n: recorded[n].output for n in graph.order if n in facts}
    return Case(
        version=version,
        weights=registered.weights_digest,
        run=run,
        step=link.step,
        graph=graph,
        recorded=recorded,
        given={n: ref for n, ref in needed.items() if ref is not None},
        package=package[0],
        metrics=tuple(n for n in wanted if n != package[0]),
    )


def prepare(case: Case, home: Home, work: Path, repository: Path) -> Prepared:
    """Make the clean home and the code of then below ``work``.

    Raises:
        MlopsRayError: The code of then cannot be made.
        FeatureStoreError: The feature tables of then are gone.
        ArtifactError: An output that is needed is missing or corrupt.
    """
    folder = _source(case, home, work / "source", repository)
    roots = tuple(str(root) for root in open_workspace(folder).projects)
    prepared = Prepared(work, folder, roots)
    clean, kept = open_artifacts(prepared.home), open_artifacts(home)
    for ref in case.given.values():
        clean.copy(ref, kept)
    for manifest in _manifests(case):
        offline = home.offline(case.run.project)
        target = prepared.home.offline(case.run.project)
        transplant(read_manifest(offline, manifest), offline, target)
    request = Request(
        home=prepared.home.root,
        config=case.run.config,
        given=dict(case.given),
        only=(case.package, *case.metrics),
        reason=f"reproduction of {case.version.name}@{case.version.version}",
    )
    write_whole(work / _REQUEST, request.model_dump_json(indent=1).encode())
    return prepared


def run_again(prepared: Prepared) -> Answer:
    """Run the steps in a process of its own with the code of then, whose output is shown.

    Raises:
        MlopsRayError: That code cannot do it.
    """
    request, answer = prepared.work / _REQUEST, prepared.work / _ANSWER
    done = subprocess.run(
        [sys.executable, "-m", "mlops_ray", "rerun", str(request), str(answer)],
        cwd=prepared.folder,
        env=environment_of(request, prepared.folder, prepared.roots),
        check=False,
    )
    if not answer.is_file():
        raise MlopsRayError(
            f"the code of then ended with exit code {done.returncode} and no answer",
            where=str(prepared.folder),
            why="see its messages above",
            fix="code from before this verb cannot be asked to run a part of a workflow",
        )
    return Answer.model_validate_json(answer.read_bytes())


def changed_code(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the definitions whose code is not the same, by dotted name."""
    return sorted(n for n in then.keys() | now.keys() if then.get(n) != now.get(n))


def recorded_code(home: Home, step: StepRecord) -> dict[str, str]:
    """Return the digests of the definitions that a step reached when it ran."""
    ledger = open_ledger(home)
    try:
        parts: dict[str, Any] = (ledger.key_parts(step.key) if step.key else None) or {}
    finally:
        ledger.close()
    return dict(parts.get("code", {}))


def _source(case: Case, home: Home, destination: Path, repository: Path) -> Path:
    """Return the folder of the code of then: rebuilt, or the present one where that is the same."""
    if case.run.provenance.get("commit"):
        return make_source(case.run.provenance, open_artifacts(home), repository, destination)
    config = case.run.config
    allowed = {"package": config.get("package"), "allow": config.get("allow", [])}
    open_workspace(repository).import_roots()
    for name in case.again:
        step = case.graph.step(name)
        now = code_with_inputs(str(step.uses), step.inputs, tuple(allowed_packages(allowed)))
        changed = changed_code(recorded_code(home, case.recorded[name]), dict(now.symbols))
        if changed:
            raise WorkflowError(
                f"the code of step {name} is not what it was, and no commit of then is known",
                where=", ".join(changed[:5]),
                fix="keep the project in a git repository, so that its code can be made again",
            )
    return repository


def _manifests(case: Case) -> list[str]:
    """Return the training manifests of the steps that run again."""
    told = (case.recorded[name].params.get("manifest") for name in case.again)
    return list(dict.fromkeys(str(manifest) for manifest in told if manifest))


def _is_package(home: Home, step: StepRecord, version: ModelVersion) -> bool:
    """Say whether a step's output is the version's package."""
    if step.output is None or step.output.kind != "tree":
        return False
    try:
        return packages.read(open_artifacts(home).get(step.output)).digest == version.digest
    except ArtifactError:
        return False
