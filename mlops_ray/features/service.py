"""Feature services: what a model asks for, in one order and by one code for training and serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import Features, FeatureService, OnDemandView, RequestField
from mlops_ray.config.targets import load
from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features.columns import NO_TIME, column, instants, wrong_type

Columns = dict[str, NDArray[Any]]
Inputs = Mapping[str, NDArray[Any]]
RequestFunction = Callable[[Columns], Mapping[str, Any]]

_MANY_ROWS = 1024


def find_service(features: Features, name: str) -> FeatureService:
    """Return the declared service.

    Raises:
        FeatureStoreError: There is none of that name, or its inputs do not fit its views.
    """
    if name not in features.services:
        raise FeatureStoreError(
            f"there is no feature service {name!r}",
            fix=f"known services: {', '.join(features.services)}",
        )
    service = features.services[name]
    for view in service.views:
        for key, dtype in features.entities[features.views[view].entity].keys.items():
            if service.inputs[key].dtype != dtype:
                raise FeatureStoreError(
                    f"input {key!r} is {service.inputs[key].dtype}, view {view!r} has it as {dtype}",
                    where=f"features.services.{name}.inputs.{key}",
                    fix=f"declare it as {dtype}",
                )
    if service.inputs[service.time].dtype != "timestamp":
        raise FeatureStoreError(
            f"the time {service.time!r} must be a timestamp",
            where=f"features.services.{name}.time",
        )
    return service


def view_columns(features: Features, view: str) -> tuple[str, ...]:
    """Return the names of a view's features in a training set: ``<view>__<feature>``."""
    return tuple(f"{view}__{name}" for name in features.views[view].feature_names)


def feature_columns(features: Features, service: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a model's numeric and categorical inputs, each in the model's order.

    The views' features come first, in the service's order, then those computed on demand. Strings
    are categorical; timestamps are given to on-demand functions only.
    """
    declared = find_service(features, service)
    numeric, categorical = [], []
    for view in declared.views:
        for name, dtype in features.views[view].features.items():
            if dtype == "string":
                categorical.append(f"{view}__{name}")
            elif dtype != "timestamp":
                numeric.append(f"{view}__{name}")
    for on_demand in on_demand_views(features, service):
        numeric.extend(on_demand.numeric)
        categorical.extend(on_demand.categorical)
    return tuple(numeric), tuple(categorical)


def on_demand_views(features: Features, service: str) -> list[OnDemandView]:
    """Return the views that a service computes at request time."""
    return [features.on_demand[name] for name in features.services[service].on_demand]


def inputs_of(table: pa.Table, service: FeatureService) -> Columns:
    """Return a service's inputs as the request function sees them.

    string → object array of ``str``; int → int64; float → float64; bool → bool; timestamp →
    ``datetime64[us]`` in UTC. A null is ``None`` in a string, int or bool column (then an object
    array), NaN in a float and NaT in a timestamp.

    Raises:
        SchemaError: An input is missing or has the wrong type.
    """
    return {name: _input(table, name, field) for name, field in service.inputs.items()}


def stored_columns(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> Columns:
    """Return stored features as models and on-demand functions see them, online and offline alike.

    float, int and bool → float64 with NaN for null; string → object array of ``str`` and None;
    timestamp → ``datetime64[us]`` in UTC with NaT for null.
    """
    return {name: _stored(values) for name, values in columns.items()}


def objects(values: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return values as an object array; equal texts of many rows are mostly one object."""
    if len(values) >= _MANY_ROWS:
        whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        # A few rows tell whether a dictionary of all would be worth its making.
        if pa.types.is_string(whole.type) and _is_repetitive(whole.slice(0, _MANY_ROWS).unique()):
            whole = whole.dictionary_encode()
        if pa.types.is_dictionary(whole.type) and _is_repetitive(whole.dictionary):
            distinct = np.array([*whole.dictionary.to_pylist(), None], object)
            places = pc.fill_null(whole.indices.cast(pa.int64()), len(distinct) - 1)
            return distinct[places.to_numpy()]
    return np.array(values.to_pylist(), object)


def _is_repetitive(distinct: pa.Array) -> bool:
    return len(distinct) <= _MANY_ROWS // 4


def _stored(values: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    if pa.types.is_string(values.type):
        return objects(values)
    if pa.types.is_timestamp(values.type):
        whole = pc.fill_null(values.cast(pa.int64()), NO_TIME)
        return np.asarray(whole.to_numpy(zero_copy_only=False)).view("datetime64[us]")
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def on_demand_features(features: Features, service: str) -> Callable[[Inputs, Inputs], Columns]:
    """Return what computes a service's on-demand features, its functions already imported.

    It takes the service's inputs and the stored features by column name, arrays [n], and returns
    float64 arrays and object arrays of ``str``.

    Raises:
        MlopsRayError: A function cannot be imported.
        SchemaError: When called: a function left out a feature, or gave it another length.
    """
    time = features.services[service].time
    views: list[tuple[RequestFunction, OnDemandView]] = [
        (load(view.function), view) for view in on_demand_views(features, service)
    ]

    def compute(inputs: Inputs, stored: Inputs) -> Columns:
        columns: Columns = {}
        for function, view in views:
            given = {**inputs, **{name: stored[name] for name in view.features}}
            columns |= _compute(function, view, given, len(inputs[time]))
        return columns

    return compute


def _compute(function: RequestFunction, view: OnDemandView, inputs: Columns, rows: int) -> Columns:
    output = function(inputs)
    columns: Columns = {}
    for name in view.numeric:
        columns[name] = np.asarray(_output(output, name, view), np.float64)
    for name in view.categorical:
        columns[name] = np.asarray(_output(output, name, view), object)
    for name, values in columns.items():
        if values.shape != (rows,):
            raise SchemaError(
                f"on-demand feature {name!r} has shape {values.shape} for {rows} rows",
                where=view.function,
                fix="return one value for each row",
            )
    return columns


def _output(output: Mapping[str, Any], name: str, view: OnDemandView) -> Any:
    try:
        return output[name]
    except KeyError as error:
        raise SchemaError(
            f"the function returned no feature {name!r}",
            where=view.function,
            why=f"it returned {', '.join(output)}",
            fix="return it, or take it out of the on-demand view's features",
        ) from error


def _input(table: pa.Table, name: str, field: RequestField) -> NDArray[Any]:
    where = f"inputs.{name}"
    if field.dtype == "timestamp":
        # The smallest int64 is both a null here and numpy's NaT.
        return instants(table, name, where).view("datetime64[us]")
    values = column(table, name, where)
    is_dictionary = pa.types.is_dictionary(values.type)
    kind = values.type.value_type if is_dictionary else values.type
    if not _FITS[field.dtype](kind):
        raise wrong_type(name, field.dtype, kind, where)
    if is_dictionary and (field.dtype != "string" or values.num_chunks > 1):
        values = values.cast(kind)
    if field.dtype == "float":
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    if field.dtype == "string" or values.null_count:
        return objects(values)
    dtype = np.bool_ if field.dtype == "bool" else np.int64
    return np.asarray(values.to_numpy(), dtype)


_FITS: dict[str, Callable[[Any], bool]] = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "int": pa.types.is_integer,
    "float": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "bool": pa.types.is_boolean,
}
