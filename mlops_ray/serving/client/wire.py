"""What clients send and what comes back: calls made of rows, results and errors made of replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import orjson

from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.client.results import Explanation, Prediction
from mlops_ray.serving.client.retries import retry_after_s

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, Sequence[Any]]

ARROW = "application/vnd.apache.arrow.stream"

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_JSON = {"Content-Type": "application/json"}
_ARROW = {"Content-Type": ARROW, "Accept": ARROW}
_NO_LOG = {"X-Mlops-Ray-Log": "off"}
_LATER = (429, 502, 503)


@dataclass(frozen=True, slots=True)
class Call:
    """One request, which may be sent more than once. ``hedged``: also while it is under way."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None
    hedged: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. ``retry_after`` is that header's value."""

    status: int
    body: bytes
    content_type: str = ""
    retry_after: str | None = None

    @property
    def later(self) -> bool:
        """Whether the call was not taken up, and may be when it comes again."""
        return self.status in _LATER


class Routes:
    """The addresses of one model's routes; a URL may name the model itself.

    Raises:
        ServingError: The address is none, or it is not clear which model is meant.
    """

    def __init__(self, endpoint: Endpoint | str, model: str | None) -> None:
        url = endpoint if isinstance(endpoint, str) else endpoint.url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServingError(
                "this is not the address of an endpoint",
                where=url,
                fix="give one like http://127.0.0.1:8000/v1/models/NAME",
            )
        path, _, named = parts.path.rstrip("/").partition("/v1/models/")
        if not isinstance(endpoint, str):
            named = endpoint.name
        name = model or unquote(named)
        if not name or "/" in name:
            raise ServingError(
                "it is not clear which model to ask",
                where=url,
                fix=f"give {url.rstrip('/')}/v1/models/NAME, or model=NAME",
            )
        self.model = name
        self.address = f"{parts.scheme}://{parts.netloc}"
        self.secure = parts.scheme == "https"
        base = f"{parts.scheme}://{parts.netloc}{path}/v1/models/{quote(name, safe='')}"
        self.predict = f"{base}/predict"
        self.feedback = f"{base}/feedback"
        self.explain = f"{base}/explain"
        self.metadata = f"{base}/metadata"
        self.ready = f"{base}/readyz"


def rows_call(
    url: str, rows: Rows | None, columns: Columns | None, ids: Sequence[str], *, log: bool
) -> Call:
    """Make the call that brings rows, or the same column by column, as JSON."""
    body = {"rows": rows} if rows is not None else {"columns": columns}
    return Call("POST", url, _headers(_JSON, log), _dumps({**body, "ids": ids}), hedged=True)


def table_call(url: str, table: pa.Table, *, log: bool) -> Call:
    """Make the call that brings a table, and wants one back."""
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    body = stream.getvalue().to_pybytes()
    return Call("POST", url, _headers(_ARROW, log), body, hedged=True)


def labels_call(url: str, labels: Rows) -> Call:
    """Make the call that brings labels."""
    return Call("POST", url, _JSON, _dumps({"labels": labels}))


def content(reply: Reply, url: str) -> Any:
    """Return the JSON content of a 200; raise what any other status means."""
    if reply.status != 200:
        raise failure(reply, url)
    try:
        return orjson.loads(reply.body)
    except orjson.JSONDecodeError as error:
        raise not_understood(url, error) from error


def prediction(reply: Reply, url: str) -> Prediction:
    """Return the prediction that a reply holds, as JSON or as an Arrow stream."""
    if reply.status == 200 and reply.content_type.startswith(ARROW):
        return _prediction_of_table(reply, url)
    found = content(reply, url)
    try:
        rows = len(found["ids"])
        return Prediction(
            ids=found["ids"],
            scores=found["scores"],
            labels=found["labels"],
            versions=found.get("versions") or [found["version"]] * rows,
            routes=found.get("routes") or [found["route"]] * rows,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise not_understood(url, error) from error


def accepted(reply: Reply, url: str) -> int:
    """Return how many labels were accepted."""
    found = content(reply, url)
    try:
        return int(found["accepted"])
    except (KeyError, TypeError, ValueError) as error:
        raise not_understood(url, error) from error


def explanation(reply: Reply, url: str) -> Explanation:
    """Return the explanation that a reply holds."""
    found = content(reply, url)
    try:
        return Explanation(
            version=found["version"],
            ids=found["ids"],
            scores=found["scores"],
            base=found["base"],
            contributions=found["contributions"],
        )
    except (KeyError, TypeError) as error:
        raise not_understood(url, error) from error


def failure(reply: Reply, url: str) -> ServingError:
    """Return the error that a reply stands for."""
    try:
        error = orjson.loads(reply.body)["error"]
        message, field, row = str(error["message"]), error["field"], error["row"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message, field, row = reply.body[:200].decode(errors="replace").strip(), None, None
    if 400 <= reply.status < 500:
        again_s = retry_after_s(reply.retry_after)
        return RequestError(
            message, status=reply.status, field=field, row=row, retry_after_s=again_s
        )
    return ServingError(
        f"the endpoint answered {reply.status}: {message}",
        where=url,
        fix="look into serve/ among the logs of Ray's session",
    )


def unreachable(url: str, error: BaseException) -> ServingError:
    """Return the error for an endpoint that cannot be reached, or does not answer in time."""
    return ServingError(
        "the endpoint does not answer",
        where=url,
        why=str(error) or type(error).__name__,
        fix="check that it is deployed: `mlops-ray run workflow=deploy`",
    )


def not_understood(url: str, error: Exception) -> ServingError:
    """Return the error for an answer that is none of an endpoint."""
    return ServingError(
        "the answer is not one of an endpoint",
        where=url,
        why=f"{type(error).__name__}: {error}",
        fix="check the address: something else may be listening there",
    )


def _prediction_of_table(reply: Reply, url: str) -> Prediction:
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(reply.body) as stream:
            columns = stream.read_all().to_pydict()
        return Prediction(
            ids=columns["id"],
            scores=columns["score"],
            labels=columns["label"],
            versions=columns["version"],
            routes=columns["route"],
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise not_understood(url, error) from error


def _headers(headers: dict[str, str], log: bool) -> dict[str, str]:
    return headers if log else headers | _NO_LOG


def _dumps(value: Any) -> bytes:
    """JSON; times without a zone are UTC on the other side. NaN becomes null, as JSON has none."""
    try:
        return orjson.dumps(value, default=_default, option=_OPTIONS)
    except TypeError as error:
        raise ServingError(
            "the request cannot be written as JSON",
            why=str(error),
            fix="use text, numbers, booleans, None and datetimes",
        ) from error


def _default(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")
