"""What came of a batch: rows, refused ones, how the scores lie, how far the features have drifted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import Field

from mlops_ray.config.base import Frozen
from mlops_ray.metadata.profile import Reference, merge
from mlops_ray.metadata.stability import psi_by_feature
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.serving.batch.folder import Done, Job, JobFolder, settle
from mlops_ray.serving.batch.pieces import REFUSED_SCHEMA


class ScoreProfile(Frozen):
    """How scores are distributed: ``counts`` in bins of equal width from 0 to 1."""

    mean: float | None = None
    counts: tuple[int, ...] = ()


class BatchResult(Frozen):
    """What a batch was scored with, and what came of it.

    ``rows`` are those in the output, ``rejected`` those in ``rejected_output``, counted in ``reasons``.
    ``psi`` compares the features of ``profiled_rows``, taken evenly from all, with those that the
    model was trained on. ``feature_versions`` are those of the views' offline tables.
    ``resumed_pieces`` were finished by an earlier call that was interrupted. With ``was_there`` an
    earlier call had put all rows there already.
    """

    job: str
    rows: int
    output: str
    model: str
    version: int
    rejected: int = 0
    rejected_output: str | None = None
    reasons: dict[str, int] = Field(default_factory=dict)
    scores: ScoreProfile = ScoreProfile()
    psi: dict[str, float] = Field(default_factory=dict)
    profiled_rows: int = 0
    feature_versions: dict[str, int] = Field(default_factory=dict)
    pieces: int = 0
    resumed_pieces: int = 0
    was_there: bool = False


def summarise(
    job: Job,
    model: ModelVersion,
    reference: Reference,
    output: str,
    rejected: Path,
    finished: Iterable[Done],
    resumed: int,
) -> BatchResult:
    """Return the result of a job whose pieces are all finished; the same in whatever order."""
    done = sorted(finished, key=lambda piece: piece.number)
    rows = sum(piece.rows for piece in done)
    refused = sum(piece.refused for piece in done)
    profile = merge(piece.counted() for piece in done)
    return BatchResult(
        job=job.id,
        rows=rows,
        output=output,
        model=model.name,
        version=model.version,
        rejected=refused,
        rejected_output=str(rejected) if refused else None,
        reasons=dict(sum((Counter(piece.reasons) for piece in done), Counter())),
        scores=ScoreProfile(
            mean=sum(piece.score_sum for piece in done) / rows if rows else None,
            counts=tuple(sum(counts) for counts in zip(*(p.scores for p in done), strict=True)),
        ),
        psi=psi_by_feature(reference.profile.counts, profile.counts),
        profiled_rows=profile.rows,
        feature_versions=job.feature_versions,
        pieces=len(done),
        resumed_pieces=resumed,
    )


def write_rejected(folder: JobFolder, finished: Iterable[Done], place: Path) -> None:
    """Put the refused rows of all pieces into one Parquet file, in the order of the input."""
    draft = place.with_name(f".{place.name}.draft")
    place.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(draft, REFUSED_SCHEMA) as writer:
        for done in sorted(finished, key=lambda piece: piece.number):
            if done.refused:
                writer.write_table(pq.read_table(folder.refused(done.number)).cast(REFUSED_SCHEMA))
    settle(draft, place)
