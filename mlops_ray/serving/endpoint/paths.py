"""Which path is what: a table, looked into once for a request."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.calls import Methods

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Found:
    """What lies at a path; ``model`` where it names another than the endpoint's own."""

    methods: Methods
    model: str | None = None
    version: int | None = None


class Paths:
    """Finds the actions of a path.

    All paths are there a second time behind ``/v1/models/<model>``: that is all that the second
    endpoint of a cluster gets of Serve's port.

    Args:
        model: The endpoint's name.
        table: Actions by path, ``{}`` in it standing for the model's name.
        many: Whether other models than the endpoint's own may be named.
    """

    def __init__(self, model: str, table: Mapping[str, Methods], *, many: bool) -> None:
        self._model = model
        self._table = dict(table)
        self._many = many
        self._prefix = f"/v1/models/{model}"
        self._known = {path.format(model): Found(methods) for path, methods in table.items()}

    def find(self, path: str) -> Found:
        """Return what lies at a path. RequestError 404 where nothing does."""
        found = self._known.get(path)
        return found if found is not None else self._search(path)

    def _search(self, path: str) -> Found:
        if path.startswith(f"{self._prefix}/"):
            found = self._known.get(path[len(self._prefix) :])
            if found is not None:
                return found
        found = self._of_model(path) or self._of_model(path.removeprefix(self._prefix))
        if found is None:
            raise self._nothing(path)
        return found

    def _of_model(self, path: str) -> Found | None:
        """Return what lies at ``/<protocol>/models/<name>[/versions/<number>][/<action>]``."""
        parts = path.split("/")
        if len(parts) < 4 or parts[2] != "models":
            return None
        name, rest, version = parts[3], parts[4:], None
        if parts[1] == "v2" and rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        methods = self._table.get("/".join([*parts[:3], "{}", *rest]))
        if methods is None:
            return None
        if name != self._model and not self._many:
            raise RequestError(f"no model {name[:80]!r} here, only {self._model}", status=404)
        return Found(methods, None if name == self._model else name, _number(version))

    def _nothing(self, path: str) -> RequestError:
        known = list(self._known)
        close = difflib.get_close_matches(path[:_SHOWN], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; try {self._prefix}/predict"
        return RequestError(f"there is nothing at {path[:_SHOWN]}{hint}", status=404)


def _number(version: str | None) -> int | None:
    if version is None:
        return None
    if not version.isascii() or not version.isdigit() or len(version) > 15:
        raise RequestError(f"no version {version[:80]!r}: versions are numbers", status=404)
    return int(version)
