"""Declarations of the feature store: sources, entities, views, request features, services."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mlops_ray.config.base import Duration, Frozen, Target, format_duration

DType = Literal["string", "int", "float", "bool", "timestamp"]


class Expectation(Frozen):
    """What must hold for one column of a source after cleaning.

    ``nulls`` is the largest share of nulls allowed, from 0 to 1. ``severity`` fail stops the step;
    warn records it.
    """

    column: str
    dtype: DType | None = None
    nulls: float | None = Field(default=None, ge=0, le=1)
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[str, ...] | None = None
    unique: bool = False
    severity: Literal["warn", "fail"] = "fail"


class Source(Frozen):
    """Where raw rows come from: a function that returns a ``pyarrow.Table``, or files.

    ``available_at`` names the column that says when a row could first be known; nothing reads a
    row before that moment. ``clean`` maps a table to a table.
    """

    read: Target | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    available_at: str
    clean: Target | None = None
    expectations: tuple[Expectation, ...] = ()
    description: str = ""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.read is None) == (self.path is None):
            raise ValueError("give either read (a function) or path (files), not both or neither")
        return self


class Entity(Frozen):
    """What features describe: the key columns and their types, in order."""

    keys: dict[str, Literal["string", "int"]]
    description: str = ""


class Aggregate(Frozen):
    """One aggregate over a trailing window: ``count`` needs no column, the others do."""

    by: Literal["count", "sum", "mean", "min", "max", "last"]
    of: str | None = None

    @model_validator(mode="after")
    def _column(self) -> Self:
        if (self.by == "count") != (self.of is None):
            raise ValueError("count takes no column in 'of'; every other aggregate needs one")
        return self


class FeatureView(Frozen):
    """A named set of features of one entity.

    Without ``windows``, each source row is a feature row with event time ``event_time`` and the
    columns ``columns``. With ``windows``, a row is emitted for each boundary H of ``every`` in which
    the entity had at least one source row in (H − every, H]; its features are ``aggregates`` over
    the entity's rows in (H − window, H], named ``<aggregate>_<window>``.

    ``ttl``: how old a row may be, at most, to still be used (None: any age).
    """

    entity: str
    source: str
    event_time: str
    columns: tuple[str, ...] = ()
    every: Duration | None = None
    windows: tuple[Duration, ...] = ()
    aggregates: dict[str, Aggregate] = Field(default_factory=dict)
    ttl: Duration | None = None
    description: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.windows and not (self.every and self.aggregates):
            raise ValueError("a view with windows needs 'every' and at least one aggregate")
        if bool(self.windows) == bool(self.columns):
            raise ValueError("give either columns, or windows with aggregates")
        return self

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the view's features, in storage order."""
        if not self.windows:
            return self.columns
        return tuple(
            f"{name}_{format_duration(window)}"
            for name in self.aggregates
            for window in self.windows
        )


class RequestFeatures(Frozen):
    """Features computed from the request itself, by the same function in training and serving.

    ``function`` maps ``{input name: numpy array [n]}`` to ``{output name: numpy array [n]}``.
    Float outputs are numeric features; string outputs are categorical ones.
    """

    function: Target
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()


class RequestField(Frozen):
    """One field that a prediction request carries."""

    dtype: DType
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None


class FeatureService(Frozen):
    """The set of features that a model asks for.

    ``inputs`` are the raw fields of a request (and columns of the label source); the views' entity
    keys are among them. ``time`` is the field that holds the prediction time.
    """

    views: tuple[str, ...]
    inputs: dict[str, RequestField]
    time: str
    request: RequestFeatures | None = None
    description: str = ""


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


class Features(Frozen):
    """The whole feature store of a project."""

    sources: dict[str, Source]
    entities: dict[str, Entity]
    views: dict[str, FeatureView]
    services: dict[str, FeatureService]
    labels: Labels
    online: Literal["lmdb"] = "lmdb"

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name, view in self.views.items():
            self._known(view.entity, self.entities, f"views.{name}.entity")
            self._known(view.source, self.sources, f"views.{name}.source")
        for name, service in self.services.items():
            for view_name in service.views:
                self._known(view_name, self.views, f"services.{name}.views")
                for key in self.entities[self.views[view_name].entity].keys:
                    self._known(key, service.inputs, f"services.{name}.inputs")
            self._known(service.time, service.inputs, f"services.{name}.time")
        self._known(self.labels.source, self.sources, "labels.source")
        return self

    @staticmethod
    def _known(name: str, known: dict[str, Any], where: str) -> None:
        if name not in known:
            raise ValueError(
                f"{where} names {name!r}, which is not declared; known: {sorted(known)}"
            )
