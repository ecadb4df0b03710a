"""The one way from a checked request to an answer: features, route, model, log."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import FeatureService
from mlops_ray.config.serving import Serving
from mlops_ray.errors import FeatureStoreError, RequestError, ServingError
from mlops_ray.features.online.failures import ServerGoneError
from mlops_ray.features.online.reader import Reads
from mlops_ray.serving.endpoint.batching import Batcher
from mlops_ray.serving.endpoint.grouping import (
    Group,
    Job,
    Scores,
    answered_by,
    check_scores,
    groups_of,
    hand_out,
    merged,
    narrowed,
    places,
    predict,
    share_out,
    taken,
)
from mlops_ray.serving.endpoint.metrics import Recorder
from mlops_ray.serving.endpoint.routing import Router
from mlops_ray.serving.endpoint.warming import sample_body
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.request import PredictRequest, RequestSchema
from mlops_ray.serving.log.encoding import Answered
from mlops_ray.serving.log.prediction_log import Added, PredictionLog
from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet
from mlops_ray.serving.models.scorer import AsyncScorer, ModelGoneError

MOST_AHEAD_US = 86_400_000_000
"""How far the time of a prediction may lie ahead of this machine's clock."""

_WARM_ROWS = (64, 1, 1, 1)

logger = logging.getLogger("ray.serve")


class Lookup(Protocol):
    """Turns the inputs of requests into all feature columns: ``features.lookup.OnlineLookup``."""

    def __call__(self, inputs: Columns) -> Columns:
        """Return every feature column of the service, [n] each."""

    @property
    def degraded(self) -> str:
        """What this thread's last call did without the online store: ``stale``, ``missing`` or
        nothing."""

    @property
    def is_gone(self) -> bool:
        """Whether the online store did not answer last: the next call may take long."""

    @property
    def reads(self) -> dict[str, Reads]:
        """What was counted of the online store, by view."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs that are keys of the online store."""


@dataclass(slots=True, eq=False)
class _Done:
    """What was made of a batch."""

    inputs: Columns
    columns: Columns
    scores: Scores
    groups: list[Group]
    features_s: float
    degraded: str


class Scoring:
    """Scores requests with the models that their routes name.

    Args:
        project: The endpoint's name.
        serving: Its configuration.
        service: The feature service that requests bring the inputs of.
        lookup: Makes features of inputs.
        own_models: Returns the models of the endpoint.
        log: Keeps what was answered.
        recorder: Counts.
        router: Chooses who answers.
        schema: Checks requests.
    """

    def __init__(
        self,
        project: str,
        serving: Serving,
        service: FeatureService,
        *,
        lookup: Lookup,
        own_models: Callable[[], ModelSet],
        log: PredictionLog,
        recorder: Recorder,
        router: Router,
        schema: RequestSchema,
    ) -> None:
        self.project = project
        self._threshold = serving.threshold
        self._retry_after_s = serving.retry_after.total_seconds()
        self._time = service.time
        self._lookup = lookup
        self._own_models = own_models
        self._inputs = service.inputs
        self._schema = schema
        self._log = log
        self._recorder = recorder
        self._router = router
        self._id_prefix = uuid.uuid4().hex
        self._id_count = 0
        self.batcher: Batcher[Job, _Done] = Batcher(
            serving.batching,
            self._do,
            self._finish,
            common=(FeatureStoreError,),
            may_wait=lambda: self._lookup.is_gone,
        )

    async def score(
        self,
        request: PredictRequest,
        deadline_s: float,
        *,
        log: bool = True,
        models: ModelSet | None = None,
        version: int | None = None,
    ) -> Answer:
        """Return the answer to a request.

        Args:
            request: What was asked, already checked.
            deadline_s: On the event loop's clock: work that has not begun by then is dropped.
            log: Whether the answer is kept and counted for the monitor.
            models: Where they are not the endpoint's own.
            version: Who is to answer, where that is not left to the routes.

        Raises:
            RequestError: 404 no such version, 422 a time in the future, 503 there are no models, the
                online store or a model's own process is gone, or the log cannot be written, 504 no
                time is left.
            Exception: What a model or a feature function raised; this request's alone.
        """
        job = self._job(request, log, models, version)
        try:
            await self.batcher.submit(job, request.rows, deadline_s)
        except ServerGoneError as error:
            raise self._unavailable() from error
        if job.columns:
            await self._score_remotely(job, job.columns)
        if log and self._log.answers_wait:
            await self._written(job)
        return self._answer(job)

    def features(self, inputs: Columns) -> Columns:
        """Return the feature columns of a request's inputs; may wait for the store, so it is for
        threads. RequestError 503 without a store."""
        try:
            return self._lookup(inputs)
        except ServerGoneError as error:
            raise self._unavailable() from error

    def warm(self, models: ModelSet) -> float:
        """Try models, look-up and parser before requests come; return the seconds that one row takes.

        Made-up values need not suit the project's functions: what they raise is none of the models'
        fault, which have shown that they can answer.
        """
        seconds = 0.0
        try:
            for wanted in _WARM_ROWS:
                began_s = time.perf_counter()
                rows = min(wanted, self._schema.max_rows)
                inputs = self._schema.parse(sample_body(self._inputs, rows)).columns
                columns = self._lookup(inputs)
                for model in models.all:
                    if not model.remote:
                        model.scorer.predict(columns)
                seconds = time.perf_counter() - began_s
        except Exception:
            logger.info("the warm-up did not come to its end", exc_info=True)
        return seconds

    def ids(self, request: PredictRequest) -> list[str]:
        """Return the request's ids, or new ones."""
        if request.ids is not None:
            return request.ids
        first, self._id_count = self._id_count, self._id_count + request.rows
        prefix = self._id_prefix
        return [f"{prefix}-{number}" for number in range(first, first + request.rows)]

    def _job(
        self, request: PredictRequest, log: bool, models: ModelSet | None, version: int | None
    ) -> Job:
        models = models or self._own_models()
        self._check_times(request)
        ids, wanted = self.ids(request), None
        if version is not None:
            wanted = of_version(models, version)
        elif not self._router.is_sticky:
            wanted = self._router.owner(models, ids[0])
        return Job(request, ids, models, wanted, time.perf_counter(), log)

    def _check_times(self, request: PredictRequest) -> None:
        times = request.columns[self._time].view(np.int64)
        latest_us = time.time_ns() // 1000 + MOST_AHEAD_US
        if int(times.max() if len(times) > 1 else times[0]) > latest_us:
            row = int(np.argmax(times > latest_us))
            raise RequestError("must not lie more than a day ahead", field=self._time, row=row)

    def _do(self, jobs: list[Job]) -> _Done:
        began_s = time.perf_counter()
        inputs = merged(jobs)
        columns = self._lookup(inputs)
        degraded = self._lookup.degraded
        features_s = time.perf_counter() - began_s
        groups = groups_of(self._router, jobs, inputs)
        scores = predict(groups, columns, len(inputs[self._time]))
        share_out(jobs, scores, degraded)
        if any(group.model.remote for group in groups):
            hand_out(jobs, columns)
        return _Done(inputs, columns, scores, groups, features_s, degraded)

    def _finish(self, jobs: list[Job], done: _Done, awaited: list[bool]) -> None:
        recorder, now_s = self._recorder, time.perf_counter()
        rows = len(done.scores)
        recorder.stage("features", done.features_s)
        recorder.batch(len(jobs), rows)
        for group in done.groups:
            if not group.model.remote:
                spec = group.model.spec
                recorder.stage("model", group.seconds, spec.alias, spec.version, group.models.name)
        if done.degraded:
            recorder.degraded(done.degraded, rows)
        # Who is no longer there has been told that there is no answer.
        kept = [
            waits and job.log and not job.columns for job, waits in zip(jobs, awaited, strict=True)
        ]
        if not any(kept):
            return
        if len(jobs) == 1:
            ids = jobs[0].ids
            latency_us = np.full(rows, int((now_s - jobs[0].began_s) * 1e6))
        else:
            ids = [identifier for job in jobs for identifier in job.ids]
            each = [int((now_s - job.began_s) * 1e6) for job in jobs]
            latency_us = np.repeat(each, [job.request.rows for job in jobs])
        groups = done.groups
        if not all(kept):
            groups = narrowed(groups, np.repeat(kept, [job.request.rows for job in jobs]))
        added = self._keep(groups, ids, done.inputs, done.columns, done.scores, latency_us)
        for job in jobs:
            job.added = added

    def _keep(
        self,
        groups: Sequence[Group],
        ids: list[str],
        inputs: Columns,
        columns: Columns,
        scores: Scores,
        latency_us: NDArray[np.int64],
    ) -> list[Added]:
        """Give the rows of groups to the log, and count who answered them."""
        sets: dict[int, list[Group]] = {}
        for group in groups:
            spec = group.model.spec
            rows = len(ids) if group.rows is None else len(group.rows)
            self._recorder.scored(spec.alias, spec.version, rows, group.models.name)
            sets.setdefault(id(group.models), []).append(group)
        whole = Answered(
            groups[0].models, [], ids, inputs[self._time], scores, inputs, columns, latency_us
        )
        try:
            return [self._log.add(answered_by(whole, of_set)) for of_set in sets.values()]
        except ServingError as error:
            raise self._not_kept() from error

    async def _score_remotely(self, job: Job, columns: Columns) -> None:
        """Have the rows scored whose models are in other processes, which gather requests
        themselves; then keep all rows."""
        groups = groups_of(self._router, [job], job.request.columns)
        for group in groups:
            if group.model.remote:
                rows = taken(columns, group.rows)
                job.scores[places(group.rows)] = await self._remote_scores(group, rows)
        check_scores(groups, job.scores)
        if job.log:
            latency_us = int((time.perf_counter() - job.began_s) * 1e6)
            each_us = np.full(job.request.rows, latency_us)
            job.added = self._keep(
                groups, job.ids, job.request.columns, columns, job.scores, each_us
            )

    async def _remote_scores(self, group: Group, columns: Columns) -> Scores:
        # Asking whether it is one takes longer than the rest here.
        scorer, spec = cast(AsyncScorer, group.model.scorer), group.model.spec
        began_s = time.perf_counter()
        try:
            scores = await scorer.apredict(columns)
        except ModelGoneError as error:
            raise RequestError(
                f"the process of {spec.alias} does not answer; send it again",
                status=503,
                retry_after_s=self._retry_after_s,
            ) from error
        seconds = time.perf_counter() - began_s
        self._recorder.stage("model", seconds, spec.alias, spec.version, group.models.name)
        return scores

    async def _written(self, job: Job) -> None:
        try:
            for added in job.added:
                await self._log.written(added)
        except ServingError as error:
            raise self._not_kept() from error

    def _not_kept(self) -> RequestError:
        return RequestError(
            "the answer could not be kept; send it again",
            status=503,
            retry_after_s=self._retry_after_s,
        )

    def _unavailable(self) -> RequestError:
        return RequestError(
            "the features cannot be looked up: the online store does not answer",
            status=503,
            field=", ".join(self._lookup.keys) or None,
            retry_after_s=self._retry_after_s,
        )

    def _answer(self, job: Job) -> Answer:
        assert job.model is not None
        threshold, scores, spec = self._threshold, job.scores, job.model.spec
        answer = Answer(
            model=self.project,
            version=spec.version,
            route=spec.alias,
            ids=job.ids,
            scores=scores,
            labels=[int(score >= threshold) for score in scores.tolist()],
            stale=job.degraded == "stale",
        )
        if job.by_row is not None:
            answer.version = answer.route = None
            answer.versions = [model.spec.version for model in job.by_row]
            answer.routes = [model.spec.alias for model in job.by_row]
        return answer


def of_version(models: ModelSet, version: int | None) -> LoadedModel:
    """Return the model of a version, None for the champion. RequestError 404 where it is not there."""
    if version is None:
        return models.answer
    for model in models.all:
        if model.spec.version == version:
            return model
    known = ", ".join(str(model.spec.version) for model in models.all)
    raise RequestError(f"version {version} is not served here; {known} is", status=404)
