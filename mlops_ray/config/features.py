"""Declarations of the feature store: sources, entities, views, request features, services."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlops_ray.config.base import Duration, Frozen, Target, format_duration

DType = Literal["string", "int", "float", "bool", "timestamp"]


def _typed(value: Any) -> Any:
    """Let a list of names stand for float columns."""
    if isinstance(value, list | tuple):
        return dict.fromkeys(value, "float")
    return value


TypedColumns = Annotated[dict[str, DType], BeforeValidator(_typed)]
"""Columns and their types: ``{price: float, shop: string}``; of a list all are float."""


class Described(Frozen):
    """What people want to know of a declaration; nothing is computed from it."""

    description: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()


class Expectation(Frozen):
    """What must hold for a source after cleaning: for one column, or by a function of your own.

    ``nulls`` is the largest share of nulls allowed, from 0 to 1; ``unique`` refuses a value that
    comes twice. ``check`` maps the whole table to True, or to a sentence that says what is wrong.
    ``severity`` fail stops the step; warn records it.
    """

    column: str | None = None
    dtype: DType | None = None
    nulls: float | None = Field(default=None, ge=0, le=1)
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] | None = None
    unique: bool = False
    check: Target | None = None
    severity: Literal["warn", "fail"] = "fail"

    @model_validator(mode="after")
    def _subject(self) -> Self:
        if (self.column is None) == (self.check is None):
            raise ValueError("give either column, with what must hold for it, or check")
        return self


class Sql(Frozen):
    """A query to any database that SQLAlchemy knows.

    ``url`` is a SQLAlchemy URL; take secrets from the environment: ``${oc.env:SHOP_DB}``. Rows are
    fetched ``batch_rows`` at a time.
    """

    url: str
    query: str
    batch_rows: int = Field(default=50_000, ge=1)


class Kafka(Frozen):
    """A topic whose messages are JSON objects.

    Each run reads on from the offsets at which the last finished run ended, to the newest message
    of that moment. ``columns`` are the fields to take. Beside them there is ``kafka_time``, the
    message's own timestamp.
    """

    servers: str
    topic: str
    columns: TypedColumns
    options: dict[str, Any] = Field(default_factory=dict)


class Source(Described):
    """Where raw rows come from; exactly one of these.

    - ``read``: a function that returns a ``pyarrow.Table``, a pandas frame or a Ray Dataset.
    - ``path``: a file, a folder, a glob or an object store's URI (``s3://…``), in a ``format`` that is
      told by the suffix where it is left out. ``options`` go to the reader: a Delta ``version``, an
      Iceberg catalog's properties, an object store's settings.
    - ``sql``, ``kafka``: see there.
    - ``push``: the columns of events that are sent over HTTP or from Python.

    ``available_at`` names the column that says when a row could first be known; nothing reads a row
    before that moment. Pushed events may leave it out: then it is when they came in
    (``received_at``). ``clean`` maps a table to a table. With ``clean_by: batch`` it is given any few
    rows at a time, so that sources larger than memory stream through.
    """

    read: Target | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    format: Literal["parquet", "csv", "json", "arrow", "delta", "iceberg"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    sql: Sql | None = None
    kafka: Kafka | None = None
    push: TypedColumns | None = None
    available_at: str = ""
    clean: Target | None = None
    clean_by: Literal["table", "batch"] = "table"
    expectations: tuple[Expectation, ...] = ()

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [
            n for n in ("read", "path", "sql", "kafka", "push") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of read (a function), path (files), sql, kafka or push, "
                f"not {' and '.join(given) or 'none'}"
            )
        if not self.available_at and self.push is None:
            raise ValueError("name the column that says when a row is known: available_at")
        if self.kafka is not None and self.available_at == "received_at":
            raise ValueError(
                "available_at of a topic may not be received_at, which is null in its first run: name "
                "kafka_time or one of the columns; nothing is used before it was received anyway"
            )
        return self

    @property
    def streams(self) -> bool:
        """Whether rows come in as events, which are known here only from some moment on."""
        return self.kafka is not None or self.push is not None

    @property
    def known_at(self) -> str:
        """The column that says when a row could first be known."""
        return self.available_at or "received_at"


class Entity(Described):
    """What features describe: the key columns and their types, in order."""

    keys: dict[str, Literal["string", "int"]] = Field(min_length=1)


class Aggregate(Frozen):
    """One aggregate over a trailing window: ``count`` needs no column, the others do.

    ``approx_distinct`` counts the distinct values of a column that is not nested, null apart, with a
    relative standard error of about 3 % (HyperLogLog).
    """

    by: Literal["count", "sum", "mean", "min", "max", "last", "approx_distinct"]
    of: str | None = None

    @model_validator(mode="after")
    def _column(self) -> Self:
        if (self.by == "count") != (self.of is None):
            raise ValueError("count takes no column in 'of'; every other aggregate needs one")
        return self


class FeatureView(Described):
    """A named set of features of one entity, made from a source or from another view's rows.

    Without ``windows``, each row of the origin is a feature row with event time ``event_time`` and the
    columns ``columns``. With ``windows``, a row is emitted for each boundary H of ``every`` in which
    the entity had at least one row in (H − every, H]; its features are ``aggregates`` over the
    entity's rows in (H − window, H], named ``<aggregate>_<window>``.

    The rows of another view (``view``) have its key columns, ``event_time``, its features, and are
    known from their created time on.

    ``ttl``: how old a row may be, at most, to still be used (None: any age; 0: only at its very
    instant). ``freshness``: how old the newest row should be, at most; reported, not enforced.
    ``version``: raise it to have all rows made anew. Columns may be added without: older rows then
    have nulls there.
    """

    entity: str
    source: str | None = None
    view: str | None = None
    event_time: str = "event_time"
    columns: TypedColumns = Field(default_factory=dict)
    every: Duration | None = None
    windows: tuple[Duration, ...] = ()
    aggregates: dict[str, Aggregate] = Field(default_factory=dict)
    ttl: Duration | None = None
    freshness: Duration | None = None
    version: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) == (self.view is None):
            raise ValueError("give either source or view, not both or neither")
        if self.source is not None and "event_time" not in self.model_fields_set:
            raise ValueError("name the source's column that says when a row happened: event_time")
        if self.view is not None and self.event_time != "event_time":
            raise ValueError("the event time of another view's rows is always event_time")
        if self.windows and not (self.every and self.aggregates):
            raise ValueError("a view with windows needs 'every' and at least one aggregate")
        if bool(self.windows) == bool(self.columns):
            raise ValueError("give either columns, or windows with aggregates")
        if self.every is not None:
            self._check_windows()
        return self

    def _check_windows(self) -> None:
        every = self.every
        if every is None or every.total_seconds() < 1:
            raise ValueError("'every' must be one second or more")
        uneven = [format_duration(w) for w in self.windows if w < every or w % every]
        if uneven:
            raise ValueError(
                f"windows must be multiples of 'every' ({format_duration(every)}): "
                f"{', '.join(uneven)} is not"
            )

    @property
    def features(self) -> dict[str, DType]:
        """The view's features and their types, in declared order."""
        if not self.windows:
            return dict(self.columns)
        return {
            f"{name}_{format_duration(window)}": (
                "int" if aggregate.by in ("count", "approx_distinct") else "float"
            )
            for name, aggregate in self.aggregates.items()
            for window in self.windows
        }

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the view's features, in declared order."""
        return tuple(self.features)


class OnDemandView(Described):
    """Features computed at request time, by the same function in training and serving.

    ``function`` maps ``{name: numpy array [n]}`` to ``{output name: numpy array [n]}``. It is given
    the service's inputs, and the stored features that ``features`` names as ``<view>__<feature>``.
    Float outputs are numeric features; string outputs are categorical ones. They have plain names
    in a training set.
    """

    function: Target
    features: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()


class RequestField(Frozen):
    """One field that a prediction request carries."""

    dtype: DType
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None


class FeatureService(Described):
    """The set of features that a model asks for: stored views, and views computed on demand.

    ``inputs`` are the raw fields of a request (and columns of the label source); the views' entity
    keys are among them. ``time`` is the field that holds the prediction time.
    """

    views: tuple[str, ...]
    on_demand: tuple[str, ...] = ()
    inputs: dict[str, RequestField]
    time: str


class Labels(Frozen):
    """Where labels come from: a source whose rows are the things to predict.

    ``id`` identifies a row, ``time`` is its prediction time, ``label`` its outcome (0 or 1; null
    while unknown or where there is none), ``known_at`` the moment when the outcome is known.
    """

    source: str
    id: str
    time: str
    label: str
    known_at: str


class Offline(Frozen):
    """How the offline store is laid out and how training sets are joined.

    ``buckets``: into how many parts a large view is cut by entity. ``known_only``: a feature row
    counts only from its created time on, as in serving.
    """

    buckets: int = Field(default=16, ge=1, le=4096)
    known_only: bool = True


class Online(Frozen):
    """Where the newest features lie for serving: LMDB in a folder, or Redis.

    ``url`` is a Redis URL. Where the store cannot be read (a Redis does not answer within
    ``timeout``), ``on_failure`` says what reads do until it can: ``error`` raises, ``missing`` finds
    nothing, ``stale`` finds what the reader itself read last of an entity.

    LMDB has to lie on a disk of the machine that reads it. On a cluster of several machines, name in
    ``copies`` a folder of each machine's own: there an actor keeps a copy of what is committed
    offline, looking for more after each ``copy_every``, and replicas read it.
    """

    store: Literal["lmdb", "redis"] = "lmdb"
    url: str = "redis://localhost:6379/0"
    timeout: Duration = Field(default="1s", validate_default=True)
    on_failure: Literal["error", "missing", "stale"] = "error"
    copies: str = ""
    copy_every: Duration = Field(default="5s", validate_default=True)


class Features(Frozen):
    """The whole feature store of a project."""

    sources: dict[str, Source]
    entities: dict[str, Entity]
    views: dict[str, FeatureView]
    on_demand: dict[str, OnDemandView] = Field(default_factory=dict)
    services: dict[str, FeatureService]
    labels: Labels
    offline: Offline = Offline()
    online: Online = Online()

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, view in self.views.items():
            where = f"views.{name}"
            self._known(view.entity, self.entities, f"{where}.entity")
            if view.source is not None:
                self._known(view.source, self.sources, f"{where}.source")
                if self.sources[view.source].kafka and view.event_time == "received_at":
                    raise ValueError(
                        f"{where}.event_time may not be received_at, which is null in a topic's "
                        "first run: name kafka_time or one of the columns"
                    )
            if view.view is not None:
                self._known(view.view, self.views, f"{where}.view")
        _ = self.view_order
        for name, service in self.services.items():
            self._check_service(name, service)
        self._known(self.labels.source, self.sources, "labels.source")
        return self

    @property
    def view_order(self) -> tuple[str, ...]:
        """The views, each after the one that it is made from."""
        order: dict[str, None] = {}

        def visit(name: str, chain: tuple[str, ...]) -> None:
            if name in chain:
                raise ValueError(f"views are made from each other: {' → '.join((*chain, name))}")
            origin = self.views[name].view
            if origin is not None:
                visit(origin, (*chain, name))
            order[name] = None

        for name in self.views:
            visit(name, ())
        return tuple(order)

    def _check_service(self, name: str, service: FeatureService) -> None:
        where = f"services.{name}"
        stored = set()
        for view_name in service.views:
            self._known(view_name, self.views, f"{where}.views")
            for key in self.entities[self.views[view_name].entity].keys:
                self._known(key, service.inputs, f"{where}.inputs")
            stored |= {f"{view_name}__{feature}" for feature in self.views[view_name].features}
        for on_demand in service.on_demand:
            self._known(on_demand, self.on_demand, f"{where}.on_demand")
            for feature in self.on_demand[on_demand].features:
                self._known(feature, dict.fromkeys(stored), f"on_demand.{on_demand}.features")
        self._known(service.time, service.inputs, f"{where}.time")

    @staticmethod
    def _known(name: str, known: dict[str, Any], where: str) -> None:
        if name not in known:
            raise ValueError(
                f"{where} names {name!r}, which is not declared; known: {sorted(known)}"
            )
