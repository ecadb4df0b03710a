"""One worker of a batch: reads a piece, checks, scores and writes it, and says what came of it."""

from __future__ import annotations

import os
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.features import Features
from mlops_ray.config.serving import Graph, PredictionLog
from mlops_ray.errors import SchemaError, ServingError
from mlops_ray.features.join import HeldView, join_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import find_service, inputs_of, on_demand_features, stored_columns
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.prediction_log.layout import BATCH_ROUTE
from mlops_ray.metadata.profile import Profile
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.serving.batch.checks import RowChecker
from mlops_ray.serving.batch.folder import Done, JobFolder, settle
from mlops_ray.serving.batch.inputs import Reader
from mlops_ray.serving.batch.pieces import Chunk, Piece, Refused, refused_table
from mlops_ray.serving.batch.writers import WRITERS, RowWriter
from mlops_ray.serving.log.encoding import Answered, Part
from mlops_ray.serving.log.pieces import write_piece
from mlops_ray.serving.models.graph import GraphFunctions, GraphScorer
from mlops_ray.serving.models.loading import LoadedModel
from mlops_ray.serving.models.scorer import Scorer
from mlops_ray.serving.models.served import ModelSpec

SCORE, LABEL, VERSION = "score", "predicted_label", "model_version"
SCORE_BINS = 20
PROFILED_ROWS = 1_000_000
"""About how many rows are counted for drift, evenly from all; more would say no more."""

ATTEMPTS = 8
"""How many workers may die at one piece before the batch fails; Ray itself never gives up."""

_HELD_ROWS = 2_000_000
_JOINED_ROWS = 262_144

Columns = dict[str, NDArray[Any]]
Member = tuple[ModelVersion, float]
"""A further model of the serving graph, and its weight; that of the model itself is 1."""


@dataclass(frozen=True)
class ScoringPlan:
    """All that a worker needs.

    Args:
        members: Further models that answer together with the model.
        schema: That of the output.
        headers: Whether each part of CSV has one.
        stride: Of how many rows one is counted for drift.
        log: How the prediction log in ``predictions`` is kept; None where it is not to have the rows.
    """

    features: Features
    service: str
    offline: Path
    versions: Mapping[str, int]
    model: ModelVersion
    graph: Graph
    members: tuple[Member, ...]
    threshold: float
    batch: BatchPredict
    reader: Reader
    folder: JobFolder
    schema: pa.Schema
    headers: bool
    stride: int
    job: str
    predictions: Path
    log: PredictionLog | None


def output_schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns of scored rows whose input has a schema.

    Raises:
        SchemaError: A column has the name of one that is added.
    """
    added = [(SCORE, pa.float64()), (LABEL, pa.int8()), (VERSION, pa.int64())]
    taken = {name for name, _ in added} & set(schema.names)
    if taken:
        raise SchemaError(
            f"the input has a column {', '.join(sorted(taken))}, which the output adds",
            where="batch.input",
            fix="rename it",
        )
    return pa.schema([*schema, *added])


class ViewColumns:
    """The stored features of rows, as of each row's own time.

    Small views are held in memory; of larger ones each call reads what it needs.
    """

    def __init__(self, plan: ScoringPlan) -> None:
        self._plan = plan
        self._service = find_service(plan.features, plan.service)
        self._store = OfflineStore(plan.offline, plan.features)
        sizes = {
            view: sum(file.rows for file in self._store.files(view, plan.versions[view]))
            for view in self._service.views
        }
        self.are_held = sum(sizes.values()) <= _HELD_ROWS
        self._held = {
            view: HeldView(plan.features, view, self._store, plan.versions[view])
            for view in sizes
            if self.are_held
        }

    def __call__(self, rows: pa.Table) -> Columns:
        """Return the features by name, arrays [n]."""
        columns: Columns = {}
        for view in self._service.views:
            columns |= stored_columns(self._join(view, rows))
        return columns

    def _join(self, view: str, rows: pa.Table) -> dict[str, pa.Array]:
        if view in self._held:
            return self._held[view].join(rows, self._service.time)
        version = self._plan.versions[view]
        features = self._plan.features
        return join_view(
            features, view, rows, self._service.time, self._store, version, on_ray=False
        )


class PieceScorer:
    """Scores pieces; one in each worker, with one thread."""

    def __init__(self, plan: ScoringPlan) -> None:
        from mlops_ray.metadata import package
        from mlops_ray.training.inference import Predictor

        pa.set_cpu_count(1)
        self._plan = plan
        self._service = find_service(plan.features, plan.service)
        self._on_demand = on_demand_features(plan.features, plan.service)
        self._stored = ViewColumns(plan)
        repeated = np.load(plan.folder.repeated) if plan.batch.id else np.empty(0, np.int64)
        self._checker = RowChecker(self._service.inputs, plan.batch.id, repeated)
        read = package.read(plan.model.package)
        spec = ModelSpec(alias=BATCH_ROUTE, version=plan.model.version, path=plan.model.package)
        scorers: list[tuple[Scorer, float]] = [(Predictor(read), 1.0)]
        scorers += [(Predictor(package.read(m.package)), weight) for m, weight in plan.members]
        scorer = GraphScorer(GraphFunctions(plan.graph), scorers)
        reference, features = read.reference, read.manifest.encoder.features
        self._model = LoadedModel(spec, scorer, reference, reference.digest, features)

    def __call__(self, pieces: pa.Table) -> pa.Table:
        """Score the pieces that a table's column ``piece`` holds as JSON; return what came of them.

        Raises:
            SourceError: A piece cannot be read.
            MlopsRayError: An on-demand function or the model fails.
        """
        given = [Piece.model_validate_json(text) for text in pieces["piece"].to_pylist()]
        return pa.table({"done": [self.score(piece).model_dump_json() for piece in given]})

    def score(self, piece: Piece) -> Done:
        """Write the files of one piece: its rows, then those refused, last that it is finished."""
        plan, folder, number = self._plan, self._plan.folder, piece.number
        tally = Tally(number)
        if folder.attempt(number) > ATTEMPTS:
            raise ServingError(
                f"{ATTEMPTS} workers have died of the same rows",
                where=f"{piece.file or plan.batch.input}, row {piece.start} and {piece.rows} more",
                why="most likely they need more memory than there is",
                fix="lower batch.batch_rows or batch.piece_rows, or give fewer workers",
            )
        with replacing(folder.part(number)) as draft:
            header = plan.headers or number == 0
            with closing(WRITERS[folder.kind](draft, plan.schema, header)) as writer:
                answers = self._answers(piece, tally, writer)
                if plan.log is None:
                    deque(answers, maxlen=0)
                else:
                    with replacing(folder.logged(number)) as log:
                        write_piece(log, answers, plan.predictions, self._service.inputs, plan.log)
        if tally.refused:
            with replacing(folder.refused(number)) as draft:
                pq.write_table(refused_table(tally.refused, piece.file), draft)
        done = tally.done()
        write_whole(folder.done(number), done.model_dump_json().encode())
        return done

    def _answers(self, piece: Piece, tally: Tally, writer: RowWriter) -> Iterator[Answered]:
        """Score a piece and write its rows, some at a time; yield them for the prediction log, where
        it is to have them."""
        batch = self._plan.batch
        held = self._stored.are_held
        batch_rows = batch.batch_rows if held else min(batch.piece_rows, _JOINED_ROWS)
        for chunk in self._plan.reader.read(piece, batch_rows):
            good = self._checker.check(chunk)
            tally.refused += good.refused
            if not good.table.num_rows:
                continue
            inputs, columns, scores = self._score(good.table)
            counted = slice(int(-good.rows[0]) % self._plan.stride, None, self._plan.stride)
            sample = {name: values[counted] for name, values in columns.items()}
            tally.add(scores, self._model.reference.bin(sample))
            writer.write(self._scored(good.table, scores))
            if self._plan.log is not None:
                yield self._answered(good, inputs, columns, scores)

    def _score(self, table: pa.Table) -> tuple[Columns, Columns, NDArray[np.float64]]:
        """Return the inputs, the features and the scores of rows."""
        columns = self._stored(table)
        inputs = inputs_of(table, self._service)
        columns |= self._on_demand(inputs, columns)
        scores = self._model.scorer.predict(columns)
        if not np.isfinite(scores).all():
            raise ServingError(f"version {self._plan.model.version} gave a score that is no number")
        return inputs, columns, scores

    def _scored(self, table: pa.Table, scores: NDArray[np.float64]) -> pa.Table:
        labels = (scores >= self._plan.threshold).astype(np.int8)
        version = np.full(len(scores), self._plan.model.version, np.int64)
        values = [*table.columns, pa.array(scores), pa.array(labels), pa.array(version)]
        fields = zip(values, self._plan.schema, strict=True)
        return pa.Table.from_arrays(
            [v if v.type == field.type else v.cast(field.type) for v, field in fields],
            schema=self._plan.schema,
        )

    def _answered(
        self, chunk: Chunk, inputs: Columns, columns: Columns, scores: NDArray[np.float64]
    ) -> Answered:
        identifier = self._plan.batch.id
        if identifier is None:
            ids = [f"{self._plan.job}-{row}" for row in chunk.rows.tolist()]
        else:
            ids = chunk.table[identifier].cast(pa.string()).to_pylist()
        times, none = inputs[self._service.time], np.zeros(len(ids), np.int64)
        parts = [Part(self._model, None, BATCH_ROUTE)]
        return Answered(None, parts, ids, times, scores, inputs, columns, none)


class Tally:
    """What has come of a piece so far."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._scores = np.zeros(SCORE_BINS, np.int64)
        self._sum = 0.0
        self._profile = Profile()
        self.refused: list[Refused] = []

    def add(self, scores: NDArray[np.float64], profile: Profile) -> None:
        """Count scores in [0, 1], and features."""
        cells = np.minimum((scores * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
        self._scores += np.bincount(cells, minlength=SCORE_BINS)
        self._sum += float(scores.sum())
        self._profile = self._profile.merge(profile)

    def done(self) -> Done:
        """Return the result."""
        reasons = Counter(
            f"{row.field} {row.reason.partition(', not ')[0]}".strip() for row in self.refused
        )
        return Done(
            number=self._number,
            rows=int(self._scores.sum()),
            refused=len(self.refused),
            reasons=dict(reasons),
            scores=tuple(self._scores.tolist()),
            score_sum=self._sum,
            profile=self._profile.to_json(),
        )


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """Give a file to write, and put it in its place when all went well."""
    draft = place.with_name(f".{place.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
        settle(draft, place)
    finally:
        draft.unlink(missing_ok=True)
