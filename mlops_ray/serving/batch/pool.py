"""The workers of a batch: a pool of Ray Data's that fills the cluster, fed with pieces."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any

from mlops_ray.errors import ServingError
from mlops_ray.serving.batch.folder import Done
from mlops_ray.serving.batch.pieces import Piece
from mlops_ray.serving.batch.worker import PieceScorer, ScoringPlan
from mlops_ray.serving.deployment.traces import root_cause


def run_pieces(plan: ScoringPlan, pieces: Sequence[Piece]) -> Generator[Done, None, None]:
    """Score pieces on the cluster; yield what came of each, as they are finished.

    Raises:
        ServingError: A worker failed; quotes the cause.
    """
    if not pieces:
        return
    import ray.data
    from ray.exceptions import RayError

    # So that no worker is left with a large one when the others have nothing to do.
    largest_first = sorted(pieces, key=lambda piece: -piece.rows)
    # Made here, each a block: from_arrow would first wait for a worker to look at them.
    blocks: Any = ray.data.from_items(
        [{"piece": piece.model_dump_json()} for piece in largest_first],
        override_num_blocks=len(largest_first),
    )
    dataset = blocks.map_batches(
        PieceScorer,
        fn_constructor_args=(plan,),
        batch_format="pyarrow",
        batch_size=None,
        compute=_pool(plan.batch.workers, len(pieces)),
        num_cpus=1,
    )
    dataset.context.enable_progress_bars = False
    try:
        for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
            for text in table["done"].to_pylist():
                yield Done.model_validate_json(text)
    except (RayError, RuntimeError) as error:
        raise ServingError(
            "the batch could not be scored",
            where=plan.batch.input,
            why=root_cause(str(error)),
            fix="correct the cause and run it again: it goes on with the finished pieces",
        ) from error


def _pool(workers: int | None, pieces: int) -> Any:
    """Return a pool of so many workers; None: as many as there are CPUs, and more when some come."""
    from ray.data import ActorPoolStrategy

    now, most = _cores()
    if workers is not None:
        now = most = workers
    return ActorPoolStrategy(
        min_size=1, initial_size=min(now, pieces), max_size=min(most or pieces, pieces)
    )


def _cores() -> tuple[int, int | None]:
    """Return how many CPUs the cluster has now, and may have (None: as many as it likes).

    Ray may have been told of more CPUs than a machine has, for work that mostly waits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    told = int(sum(resources.get("CPU", 0) for resources in nodes))
    if len(nodes) > 1:
        return max(1, told), None
    real = len(os.sched_getaffinity(0))
    return max(1, min(told, real)), max(1, min(told, real))
