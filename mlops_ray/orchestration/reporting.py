"""What a step reports while it runs: progress on its way to the ledger, facts at once."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from functools import lru_cache
from typing import Any

from mlops_ray.errors import LedgerError, WorkflowError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, Link, LinkKind, NewEvent, StepChange

_LEAST_BETWEEN_UPDATES_S = 0.5
_LAST_UPDATE_PATIENCE_S = 5.0


def _plain(what: str, value: Any) -> Any:
    """Return a value as JSON holds it; what JSON does not know becomes text."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise WorkflowError(
            f"{what} cannot be recorded", why=str(error), fix="report what JSON can hold"
        ) from error


@lru_cache(maxsize=4)
def ledger_of(home: Home) -> Ledger:
    """Return this process's ledger of a home, opened when it is first asked for."""
    return open_ledger(home)


class LiveReporter:
    """A reporter that shows progress in the ledger at most twice a second and waits for none of it.

    Metrics, parameters, links and the last progress are kept, to go back with the step's result.
    Events are durable on return.

    Args:
        fence: The lease of the run; None for a step that outlives its driver.
    """

    def __init__(
        self, project: str, home: Home, run_id: str, step: str, item: int, fence: Lease | None
    ) -> None:
        self._project = project
        self._home = home
        self._where = {"run_id": run_id, "step": step}
        self._item = item
        self._fence = fence
        self._sent_s = time.monotonic()
        self._sender: threading.Thread | None = None
        self.rows: int | None = None
        self.message = ""
        self.metrics: dict[str, float] = {}
        self.params: dict[str, Any] = {}
        self.links: list[Link] = []

    def progress(self, *, rows: int | None = None, message: str = "") -> None:
        """Record rows done and a message."""
        self.rows = int(rows) if rows is not None else self.rows
        self.message = str(message) or self.message
        self._show()

    def metric(self, name: str, value: float) -> None:
        """Record a metric."""
        self.metrics[name] = float(value)
        self._show()

    def param(self, name: str, value: Any) -> None:
        """Record a parameter."""
        self.params[name] = _plain(f"parameter {name!r}", value)

    def event(self, kind: str, **data: Any) -> None:
        """Append an event to the ledger."""
        data = _plain(f"event {kind!r}", data)
        if self._item >= 0:
            data = {"item": self._item, **data}
        event = NewEvent(project=self._project, kind=kind, data=data, **self._where)
        ledger_of(self._home).apply([event], fence=self._fence)

    def reads(self, kind: LinkKind, name: str) -> None:
        """Record that the step reads something."""
        self.links.append(Link(**self._where, direction="reads", kind=kind, name=name))

    def writes(self, kind: LinkKind, name: str) -> None:
        """Record that the step has made something."""
        self.links.append(Link(**self._where, direction="writes", kind=kind, name=name))

    def close(self) -> None:
        """Let an update that is on its way arrive, so that none comes after the step's result."""
        if self._sender is not None:
            self._sender.join(_LAST_UPDATE_PATIENCE_S)

    def _show(self) -> None:
        moment_s = time.monotonic()
        busy = self._sender is not None and self._sender.is_alive()
        if busy or moment_s - self._sent_s < _LEAST_BETWEEN_UPDATES_S:
            return
        self._sent_s = moment_s
        values = {"rows": self.rows, "message": self.message or None, "metrics": self.metrics}
        change = StepChange(
            run_id=self._where["run_id"],
            name=self._where["step"],
            item=self._item,
            values={name: value for name, value in values.items() if value},
        )
        self._sender = threading.Thread(target=self._send, args=(change,), daemon=True)
        self._sender.start()

    def _send(self, change: StepChange) -> None:
        with contextlib.suppress(LedgerError):
            ledger_of(self._home).apply([change], fence=self._fence)
