"""Feature services: what a model asks for, in one order and by one code for training and serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Features, FeatureService, RequestFeatures, RequestField
from mlops_ray.config.targets import load
from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features.columns import column, instants, wrong_type

Columns = dict[str, NDArray[Any]]
RequestFunction = Callable[[Columns], Mapping[str, Any]]


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

    The views' features come first, in the service's order, then the request features.
    """
    declared = find_service(features, service)
    numeric = [name for view in declared.views for name in view_columns(features, view)]
    request = declared.request or _NO_REQUEST_FEATURES
    return (*numeric, *request.numeric), tuple(request.categorical)


def inputs_of(table: pa.Table, service: FeatureService) -> Columns:
    """Return a service's inputs as the request function sees them.

    string → object array of ``str``; int → int64; float → float64; bool → bool; timestamp →
    ``datetime64[us]`` in UTC. A null is ``None`` in a string, int or bool column (then an object
    array), NaN in a float and NaT in a timestamp.

    Raises:
        SchemaError: An input is missing or has the wrong type.
    """
    return {name: _input(table, name, field) for name, field in service.inputs.items()}


def request_features(service: FeatureService, inputs: Columns) -> Columns:
    """Return the request features of some inputs: float64 arrays and object arrays of ``str``.

    Raises:
        SchemaError: The project's function left out a feature, or gave it another length.
    """
    if service.request is None:
        return {}
    rows = len(inputs[service.time])
    return _compute(load(service.request.function), service.request, inputs, rows)


def request_function(service: FeatureService) -> Callable[[Columns], Columns]:
    """Return ``request_features`` of a service with its function already imported."""
    request, time = service.request, service.time
    if request is None:
        return lambda inputs: {}
    function: RequestFunction = load(request.function)
    return lambda inputs: _compute(function, request, inputs, len(inputs[time]))


def _compute(
    function: RequestFunction, request: RequestFeatures, inputs: Columns, rows: int
) -> Columns:
    output = function(inputs)
    columns: Columns = {}
    for name in request.numeric:
        columns[name] = np.asarray(_output(output, name, request), np.float64)
    for name in request.categorical:
        columns[name] = np.asarray(_output(output, name, request), object)
    for name, values in columns.items():
        if values.shape != (rows,):
            raise SchemaError(
                f"request feature {name!r} has shape {values.shape} for {rows} rows",
                where=request.function,
                fix="return one value for each row",
            )
    return columns


def _output(output: Mapping[str, Any], name: str, request: RequestFeatures) -> Any:
    try:
        return output[name]
    except KeyError as error:
        raise SchemaError(
            f"the function returned no feature {name!r}",
            where=request.function,
            why=f"it returned {', '.join(output)}",
            fix="return it, or take it out of the service's request features",
        ) from error


def _input(table: pa.Table, name: str, field: RequestField) -> NDArray[Any]:
    where = f"inputs.{name}"
    if field.dtype == "timestamp":
        # The smallest int64 is both a null here and numpy's NaT.
        return instants(table, name, where).view("datetime64[us]")
    values = column(table, name, where)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _FITS[field.dtype](values.type):
        raise wrong_type(name, field.dtype, values.type, where)
    if field.dtype == "float":
        return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    if field.dtype == "string" or values.null_count:
        return np.array(values.to_pylist(), object)
    dtype = np.bool_ if field.dtype == "bool" else np.int64
    return np.asarray(values.to_numpy(), dtype)


_FITS: dict[str, Callable[[Any], bool]] = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "int": pa.types.is_integer,
    "float": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "bool": pa.types.is_boolean,
}
_NO_REQUEST_FEATURES = RequestFeatures(function="builtins.dict")
