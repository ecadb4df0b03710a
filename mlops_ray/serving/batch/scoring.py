"""Batch scoring: rows in, the same rows with scores out, each exactly once.

The input is cut into numbered pieces. A worker writes a piece's output to a file of its own, and then
that the piece is finished; when all are, the files become the output in one step. A job that is killed
at any moment goes on from the finished pieces when it is called again.

Features are joined from the offline store as of each row's own time, so rows of the past are scored
with what was known then; a row of now gets what the online store would give.
"""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.features import Features, FeatureService
from mlops_ray.config.serving import Serving
from mlops_ray.errors import DataError, ServingError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import find_service, inputs_of
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.package import Package
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.orchestration.context import Context
from mlops_ray.serving.batch.duplicates import repeated_rows
from mlops_ray.serving.batch.folder import Done, Job, JobFolder, discard, exclusive, only
from mlops_ray.serving.batch.inputs import Input, open_input
from mlops_ray.serving.batch.outputs import Output, job_home, open_output, part_files
from mlops_ray.serving.batch.pool import run_pieces
from mlops_ray.serving.batch.report import BatchResult, summarise, write_rejected
from mlops_ray.serving.batch.worker import PROFILED_ROWS, Member, ScoringPlan, output_schema
from mlops_ray.serving.log.pieces import publish_piece

_LETTERS = 16
_NO_RUN = Context.run_id


@dataclass(frozen=True)
class Batch:
    """What a call of ``score_batch`` works with."""

    context: Context
    project: str
    features: Features
    serving: Serving
    settings: BatchPredict
    model: ModelVersion
    members: tuple[Member, ...]
    package: Package
    home: Path

    @property
    def service(self) -> FeatureService:
        """The service of the model."""
        return find_service(self.features, self.package.manifest.service_name)

    @property
    def wanted(self) -> object:
        """A JSON value that is another one where other rows, or other scores, are asked for."""
        ignored = {"rejected", "max_rejected", "workers", "model"}
        return {
            "model": self.package.digest,
            "version": self.model.version,
            "features": self.features.model_dump(mode="json"),
            "graph": self.serving.graph.model_dump(mode="json"),
            "members": [(packages.digest(m.package), weight) for m, weight in self.members],
            "threshold": self.serving.threshold,
            "log": self.serving.log.model_dump(mode="json") if self.settings.log else None,
            "batch": self.settings.model_dump(mode="json", exclude=ignored),
        }


def score_batch(
    context: Context,
    project: str,
    features: Features,
    serving: Serving,
    model: ModelVersion,
    settings: BatchPredict,
    members: Sequence[Member] = (),
) -> BatchResult:
    """Score ``settings.input`` with a model and put the rows, whole or not at all, in the output.

    The output has the input's rows in their order and its columns, followed by ``score`` (float64),
    ``predicted_label`` (int8) and ``model_version`` (int64). Where a call of the same batch was
    interrupted, this one goes on with its finished pieces and its versions of the features. The
    functions of ``serving.graph`` are applied; ``members`` are its further models.

    Raises:
        SourceError: There is no input, or it cannot be read.
        SchemaError: A column is missing or has the wrong type.
        DataError: More rows are refused than may be; they are in the file of rejected rows.
        ServingError: Another call is at work on the output, or scoring failed.
    """
    home = job_home(settings, context.home)
    read = packages.read(model.package)
    batch = Batch(context, project, features, serving, settings, model, tuple(members), read, home)
    with exclusive(home / "lock", settings.output):
        return _score(batch)


def _score(batch: Batch) -> BatchResult:
    settings = batch.settings
    staging = batch.home / f"query-{digest_json([settings.input, settings.query])[:_LETTERS]}"
    source = open_input(settings, batch.service.inputs, staging)
    inputs_of(source.reader.schema.empty_table(), batch.service)
    output = open_output(settings, source.kind, batch.context.home)
    schema = output.check(output_schema(source.reader.schema))
    identity = digest_json([batch.wanted, source.identity])[:_LETTERS]
    folder = JobFolder(output.work / identity, batch.home / "log" / identity, output.kind)
    only(output.work, {identity})
    only(folder.log.parent, {identity})
    if not folder.report.is_file():
        job = _job(batch, source, folder, identity, output.epoch)
        if _finished(batch, job.id).is_file() or output.holds(job.id):
            return _was_there(batch, job)
        plan = ScoringPlan(
            features=batch.features,
            service=batch.package.manifest.service_name,
            offline=batch.context.home.offline(batch.project),
            versions=job.feature_versions,
            model=batch.model,
            graph=batch.serving.graph,
            members=batch.members,
            threshold=batch.serving.threshold,
            batch=settings,
            reader=source.reader,
            schema=schema,
            folder=folder,
            headers=output.headers,
            stride=max(1, source.rows // PROFILED_ROWS),
            job=job.id,
            log=batch.serving.log if settings.log else None,
            predictions=batch.context.home.predictions(batch.project),
        )
        result = _finish_pieces(batch, job, plan, _rejected(batch, output))
        write_whole(folder.report, result.model_dump_json().encode())
    result = BatchResult.model_validate_json(folder.report.read_bytes())
    _settle(batch, result, folder, output, schema)
    shutil.rmtree(staging, ignore_errors=True)
    return result


def _job(batch: Batch, source: Input, folder: JobFolder, identity: str, epoch: int) -> Job:
    """Return the job that was begun and is not finished, or a new one.

    What is added to an output has the same id whoever adds it; what replaces it may do so again, but
    in one run of a workflow it does so once.
    """
    if folder.job.is_file():
        return Job.model_validate_json(folder.job.read_bytes())
    store = OfflineStore(batch.context.home.offline(batch.project), batch.features)
    versions = {view: store.version(view) for view in batch.service.views}
    run, step = batch.context.run_id, batch.context.step
    replacing = uuid.uuid4().hex if run == _NO_RUN else [run, step, batch.context.item]
    once = [versions, epoch] if batch.settings.append else replacing
    digest = digest_json([identity, once])[:_LETTERS]
    return Job(id=digest, pieces=source.pieces, feature_versions=versions)


def _finish_pieces(batch: Batch, job: Job, plan: ScoringPlan, rejected: Path) -> BatchResult:
    folder = plan.folder
    folder.begin(job)
    if plan.batch.id and not folder.repeated.is_file():
        ids, rows = folder.root / "ids", plan.batch.batch_rows
        np.save(folder.repeated, repeated_rows(plan.reader, job.pieces, plan.batch.id, rows, ids))
    finished = folder.finished()
    resumed = len(finished)
    left = [piece for piece in job.pieces if piece.number not in finished]
    try:
        _watch(batch, job, finished)
        with closing(run_pieces(plan, left)) as results:
            for done in results:
                finished[done.number] = done
                _watch(batch, job, finished)
    except DataError:
        write_rejected(folder, finished.values(), rejected)
        discard(folder.root)
        raise
    if len(part_files(folder.parts)) != len(job.pieces):
        raise ServingError(
            "parts of the output are missing",
            where=str(folder.parts),
            why="somebody has removed them",
            fix="remove the folder and run the batch again",
        )
    return summarise(
        job,
        batch.model,
        batch.package.reference,
        batch.settings.output,
        rejected,
        finished.values(),
        resumed,
    )


def _watch(batch: Batch, job: Job, finished: Mapping[int, Done]) -> None:
    """Tell how far the job is.

    Raises:
        DataError: More rows have been refused than may be.
    """
    rows = sum(done.rows for done in finished.values())
    refused = sum(done.refused for done in finished.values())
    whole = sum(piece.rows for piece in job.pieces)
    of = rows + refused if len(finished) == len(job.pieces) else whole
    more = f", {refused:,} rejected" if refused else ""
    batch.context.reporter.progress(rows=rows, message=f"{rows:,} of {of:,} rows scored{more}")
    if refused > batch.settings.max_rejected * of:
        reasons = sum((Counter(done.reasons) for done in finished.values()), Counter[str]())
        told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
        raise DataError(
            f"{refused:,} of {of:,} rows are not what {batch.package.manifest.service_name!r} "
            f"declares; {batch.settings.max_rejected:.2%} may be",
            where=batch.settings.input,
            why=told,
            fix="see the file of rejected rows; correct the input, or raise max_rejected",
        )


def _settle(
    batch: Batch, result: BatchResult, folder: JobFolder, output: Output, schema: pa.Schema
) -> None:
    """Put everything in its place. Each of these steps may come again after a kill."""
    output.commit(result.job, schema, folder.parts)
    rejected = _rejected(batch, output)
    if result.rejected:
        write_rejected(folder, folder.finished().values(), rejected)
    else:
        rejected.unlink(missing_ok=True)
    if batch.settings.log:
        predictions = batch.context.home.predictions(batch.project)
        for number in range(result.pieces):
            publish_piece(folder.logged(number), predictions, result.job, number)
    finished = _finished(batch, result.job)
    if not batch.settings.append:
        shutil.rmtree(finished.parent, ignore_errors=True)
    write_whole(finished, result.model_dump_json().encode())
    discard(folder.root)
    shutil.rmtree(folder.log, ignore_errors=True)
    shutil.rmtree(output.work, ignore_errors=True)


def _was_there(batch: Batch, job: Job) -> BatchResult:
    told = _finished(batch, job.id)
    if not told.is_file():
        raise ServingError(
            "these rows have been added to the output before, from another home",
            where=batch.settings.output,
            fix="there is nothing to do; to add them again, remove the others first",
        )
    result = BatchResult.model_validate_json(told.read_bytes())
    return result.model_copy(update={"was_there": True})


def _finished(batch: Batch, job: str) -> Path:
    """Return the file that tells of a finished job; of those that replaced others, the last is kept."""
    kind = "added" if batch.settings.append else "replaced"
    return batch.home / kind / f"{job}.json"


def _rejected(batch: Batch, output: Output) -> Path:
    return Path(batch.settings.rejected).absolute() if batch.settings.rejected else output.rejected
