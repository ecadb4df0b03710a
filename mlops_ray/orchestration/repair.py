"""Outputs that were lost: found missing or corrupt when they were read, and made again."""

from __future__ import annotations

from collections.abc import Iterable

from mlops_ray.errors import StepError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.recording import Recorder


class Repair:
    """Finds what made an artifact, and lets it run again.

    Args:
        graph: The steps.
        frontier: How far the run is.
        recorder: Where a loss is recorded.
        artifacts: Where outputs are.
    """

    def __init__(
        self, graph: Graph, frontier: Frontier, recorder: Recorder, artifacts: ArtifactStore
    ) -> None:
        self._graph = graph
        self._frontier = frontier
        self._recorder = recorder
        self._artifacts = artifacts
        self._makers: dict[str, list[str]] = {}

    def makers(self, name: str, digest: str) -> list[str]:
        """Return the steps whose outputs hold an artifact that a step cannot read, and remove it.

        They can only make it again if it is not there: what is there is not written.

        Raises:
            StepError: One of them must not run again.
        """
        if digest not in self._makers:
            found = self._holders(name, digest)
            if not found:
                return []
            for maker in found:
                self._enforce_repeatable(name, maker, digest)
                self._recorder.lost(maker, -1, digest, found_by=name)
            self._makers[digest] = found
            self._artifacts.discard(digest)
        return self._makers[digest]

    def reopen(self, name: str, digests: Iterable[str]) -> None:
        """Let what made the artifacts run again, and after it the step that wants them."""
        makers = {maker for digest in digests for maker in self.makers(name, digest)}
        self._frontier.reopen(sorted(makers), then=name)

    def error(self, name: str, digest: str) -> StepError:
        """Return the error of a step that cannot read an artifact."""
        return StepError(
            f"an input cannot be read: artifact {digest[:12]} is missing or corrupt",
            step=name,
            run_id=self._recorder.run.run_id,
            where=f"step {name}",
        )

    def _holders(self, name: str, digest: str) -> list[str]:
        outputs = self._frontier.outputs
        known = sorted(other for other in self._graph.needs[name] if other in outputs)
        return [other for other in known if digest in self._artifacts.needs(outputs[other])]

    def _enforce_repeatable(self, name: str, maker: str, digest: str) -> None:
        step = self._graph.step(maker)
        given = self._recorder.steps[maker].message == "given"
        if given or (step.mode == "effect" and not step.idempotent):
            error = self.error(name, digest)
            error.why = f"it is the output of {maker}, which " + (
                "was given" if given else "must not run twice"
            )
            raise error
