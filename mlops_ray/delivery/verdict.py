"""Whether a version came out again as it was, and where the first difference is if it did not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlops_ray.delivery.differences import describe
from mlops_ray.delivery.reproduction import Case, Prepared, changed_code, recorded_code
from mlops_ray.delivery.rerun import Answer
from mlops_ray.errors import ArtifactError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import ArtifactRef, open_artifacts
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.home import Home


@dataclass(frozen=True)
class Mismatch:
    """The first step whose output is another one.

    ``now`` is None where the step failed: ``lines`` then say why. ``code`` are definitions that it
    reaches whose code is not the same, which should be none.
    """

    step: str
    then: str
    now: str | None
    lines: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The digests of weights and metrics, then and now; None now where they were not reached."""

    weights: tuple[str, str | None]
    metrics: tuple[str, str | None]
    first: Mismatch | None

    @property
    def identical(self) -> bool:
        """Whether weights and metrics came out as they were."""
        return self.weights[0] == self.weights[1] and self.metrics[0] == self.metrics[1]


def judge(case: Case, home: Home, prepared: Prepared, answer: Answer) -> Verdict:
    """Compare what came out with what was recorded, step by step in their order."""
    package = answer.steps[case.package].output if case.package in answer.steps else None
    metrics = {n: answer.steps[n].output if n in answer.steps else None for n in case.metrics}
    then = digest_json({name: case.output(name).digest for name in case.metrics})
    reached = {name: ref.digest for name, ref in metrics.items() if ref is not None}
    # Where no metrics came out none are the same.
    now = digest_json(reached) if reached and len(reached) == len(metrics) else None
    if len(case.metrics) == 1:
        then, now = case.output(case.metrics[0]).digest, reached.get(case.metrics[0])
    return Verdict(
        weights=(case.weights, _weights(prepared.home, package)),
        metrics=(then, now),
        first=_first(case, home, prepared, answer),
    )


def record(case: Case, home: Home, verdict: Verdict, seconds: float, changes: list[str]) -> None:
    """Append the verdict to the ledger, as event ``reproduced`` of the run that registered it."""
    ledger = open_ledger(home)
    try:
        ledger.append(
            case.run.project,
            "reproduced",
            {
                "model": case.version.name,
                "version": case.version.version,
                "identical": verdict.identical,
                "weights": list(verdict.weights),
                "metrics": list(verdict.metrics),
                "first_difference": verdict.first.step if verdict.first else None,
                "environment": changes,
                "seconds": round(seconds, 3),
            },
            run_id=case.run.run_id,
            step=case.step,
        )
    finally:
        ledger.close()


def _first(case: Case, home: Home, prepared: Prepared, answer: Answer) -> Mismatch | None:
    for name in case.again:
        then, result = case.output(name), answer.steps.get(name)
        if result is not None and result.output is not None:
            if result.output.digest == then.digest:
                continue
            lines = _lines(home, then, prepared.home, result.output)
            code = changed_code(recorded_code(home, case.recorded[name]), result.code)
            return Mismatch(name, then.digest, result.output.digest, lines, tuple(code))
        why = (result.error if result else None) or answer.error or "it did not run"
        return Mismatch(name, then.digest, None, (why,))
    return None


def _lines(home: Home, then: ArtifactRef, clean: Home, now: ArtifactRef) -> tuple[str, ...]:
    if then.kind != now.kind:
        return (f"a {then.kind} then, a {now.kind} now",)
    try:
        values = (open_artifacts(home).get(then), open_artifacts(clean).get(now))
        return tuple(describe(then.kind, *values))
    except ArtifactError as error:
        return (f"cannot be compared: {error.what}",)
    except Exception as error:
        # Steps give whatever they like; that the digests differ is known all the same.
        return (f"cannot be compared: {type(error).__name__}: {error}",)


def _weights(home: Home, package: ArtifactRef | None) -> str | None:
    if package is None:
        return None
    path: Path = open_artifacts(home).get(package)
    return packages.read(path).weights_digest
