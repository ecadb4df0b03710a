"""What a run's loop hears from elsewhere: from Ray, from the keeper of its lease, from a person."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

from mlops_ray.errors import LedgerError
from mlops_ray.orchestration.tasks import Ticket


@dataclass(frozen=True)
class Returned:
    """A ticket's calls are over: with the bytes of their outcomes, or an error of Ray's."""

    ticket: Ticket
    answer: Any


@dataclass(frozen=True)
class Lost:
    """The lease is no longer ours, or may not be."""

    error: LedgerError


@dataclass(frozen=True)
class CancelAsked:
    """Somebody wants the run to end."""

    by: str


@dataclass(frozen=True)
class Progress:
    """What running steps say of themselves: rows and a message, by step."""

    steps: dict[str, tuple[int | None, str | None]]


Message = Returned | Lost | CancelAsked | Progress
Mailbox = queue.SimpleQueue[Message]


class Cancelled(BaseException):
    """The run is to end because somebody asked for it."""
