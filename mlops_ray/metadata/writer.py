"""One process that writes a SQLite ledger for all others of a Ray cluster.

SQLite lets one writer in at a time, and each commit waits for the disk. So the processes of a cluster
send what they want written to one detached actor, which commits what has gathered in one transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
import sqlalchemy as sa
from ray.exceptions import (
    ActorHandleNotFoundError,
    GetTimeoutError,
    RayActorError,
    RaySystemError,
    RpcError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlops_ray.errors import LedgerError, MlopsRayError
from mlops_ray.metadata.database import PATIENCE_S, Database
from mlops_ray.metadata.operations import Request
from mlops_ray.metadata.schema import REVISION

NAMESPACE = "mlops_ray"
_PROTOCOL = 3
"""Changes with what clients and writer say to each other: a writer outlives the jobs of a cluster."""

_CALLS_AT_ONCE = 32
_MOST_IN_ONE_COMMIT = 64
_AWAY = (RayActorError, GetTimeoutError, ActorHandleNotFoundError, RaySystemError, RpcError)
_ANSWER_S = 2 * PATIENCE_S
_AWAY_S = 2 * PATIENCE_S
_LONGEST_PAUSE_S = 0.5
_NOTHING = object()


class Writer:
    """Writes and reads a ledger for others; calls of many threads share commits.

    Args:
        url: SQLAlchemy URL of a SQLite file.
        node: The node on which the ledger was opened first. Elsewhere the file has to be there:
            a folder that is not shared would otherwise become a second, empty ledger.
    """

    def __init__(self, url: str, node: str) -> None:
        self._url = url
        self._node = node
        self._opening = threading.Lock()
        self._database: Database | None = None
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="ledger", daemon=True).start()

    def pid(self) -> int:
        """Return its process."""
        return os.getpid()

    def place(self) -> tuple[str, int]:
        """Return the node and the number of the file there: who has the same may read it himself."""
        self._open()
        return ray.get_runtime_context().get_node_id(), _file_number(self._url)

    def write(self, request: Request) -> Any:
        """Do an operation; return its reply, or the error as a value."""
        done: Future[Any] = Future()
        self._waiting.put((request, done))
        return done.result()

    def read(self, query: str, arguments: tuple[Any, ...]) -> Any:
        """Return the rows of a query, or the error as a value."""
        try:
            return self._open().read(query, *arguments)
        except Exception as error:
            return error

    def _open(self) -> Database:
        with self._opening:
            if self._database is None:
                here = ray.get_runtime_context().get_node_id()
                self._database = Database(self._url, create=here == self._node)
            return self._database

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _MOST_IN_ONE_COMMIT:
                    batch.append(self._waiting.get_nowait())
            try:
                replies = self._open().write_all([request for request, _ in batch])
            except Exception as error:
                replies = [error] * len(batch)
            for (_, done), reply in zip(batch, replies, strict=True):
                done.set_result(reply)


class RemoteDatabase:
    """A database behind the cluster's writer.

    Processes on the writer's node read the file themselves, for readers do not disturb SQLite, and
    write to it themselves while the writer is away; those on other nodes wait. The process that
    starts the writer does not wait for it either, nor does one whose connection to Ray has ended.

    Args:
        url: SQLAlchemy URL of a SQLite file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = _name_of(url)
        self._lock = threading.Lock()
        self._alone: Database | None = None
        self._beside: Database | None = None
        self._is_near = False
        self._is_met = False
        self.actor = self._find(create=True)
        self._meet()

    def write(self, operation: str, *arguments: Any) -> Any:
        """Do an operation in one transaction; on return it is durable.

        Raises:
            LedgerError: The database refuses, or the writer does not answer.
        """
        if (own := self._directly()) is not None:
            return own.write(operation, *arguments)
        request = Request(operation, arguments, uuid.uuid4().hex)

        def send(again: bool) -> Any:
            return ray.get(self.actor.write.remote(_sent(request, again)), timeout=_ANSWER_S)

        def do() -> Any:
            own = self._at_hand()
            return _NOTHING if own is None else own.write_all([_sent(request, True)])[0]

        return self._ask(send, do)

    def read(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Return the rows of a query.

        Raises:
            LedgerError: The database refuses, or the writer does not answer.
        """
        own = self._directly() or self._at_hand()
        if own is not None:
            return own.read(query, *arguments)

        def send(_again: bool) -> Any:
            return ray.get(self.actor.read.remote(query, arguments), timeout=_ANSWER_S)

        found: list[dict[str, Any]] = self._ask(send, lambda: _NOTHING)
        return found

    def close(self) -> None:
        """Close the connections of this process; the writer keeps its own."""
        with self._lock:
            for own in (self._alone, self._beside):
                if own is not None:
                    own.close()

    def _ask(self, send: Callable[[bool], Any], do: Callable[[], Any]) -> Any:
        """Ask the writer; while it is away, ``do`` it here where that is possible, or wait."""
        deadline, pause, again = time.monotonic() + _AWAY_S, 0.02, False
        while True:
            try:
                if again:
                    self.actor = self._find(create=False)
                reply = send(again)
                break
            except _AWAY as error:
                self._is_met = False
                if (reply := do()) is not _NOTHING:
                    break
                if time.monotonic() > deadline:
                    raise self._silent(error) from error
            except Exception as error:
                raise self._silent(error) from error
            again = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if not self._is_met:
            self._find_again()
        if isinstance(reply, Exception):
            raise reply if isinstance(reply, MlopsRayError) else self._silent(reply) from reply
        return reply

    def _silent(self, error: Exception) -> LedgerError:
        return LedgerError(
            "the ledger's writer does not answer",
            where=f"actor {self._name}, {self._url}",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="see whether the cluster is well (`ray status`), then run the same command again",
        )

    def _directly(self) -> Database | None:
        if not ray.is_initialized():
            with self._lock:
                self._alone = self._alone or Database(self._url)
        elif self._alone is not None and not self._is_met:
            self._meet()
        return self._alone

    def _find(self, *, create: bool) -> Any:
        """Return the writer, started where there is none; ``create`` allows it a new ledger."""
        with contextlib.suppress(ValueError):
            return ray.get_actor(self._name, namespace=NAMESPACE)
        if not create and not _file_number(self._url):
            # It has ended for good, and here it could only begin another ledger.
            raise RayActorError
        node = ray.get_runtime_context().get_node_id()
        made: Any = ray.remote(Writer)
        options = made.options(
            name=self._name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=_CALLS_AT_ONCE,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        )
        try:
            actor = options.remote(self._url, node if create else "")
        except ValueError:
            # Another process was faster.
            return ray.get_actor(self._name, namespace=NAMESPACE)
        with self._lock:
            self._alone = self._alone or Database(self._url, create=create)
        return actor

    def _find_again(self) -> None:
        with contextlib.suppress(*_AWAY):
            self.actor = self._find(create=False)
            self._meet()

    def _meet(self) -> None:
        """Ask the writer where it is, without waiting for the answer."""
        with contextlib.suppress(*_AWAY):
            self._is_met = True
            self.actor.place.remote().future().add_done_callback(self._leave_to_writer)

    def _leave_to_writer(self, answer: Future[tuple[str, int]]) -> None:
        """Stop to write alone, and see whether the writer's file is at hand."""
        if answer.exception() is not None:
            self._is_met = False
            return
        is_near = answer.result() == self._place()
        with self._lock:
            self._is_near = is_near
            owned = [self._alone, self._beside]
            self._alone = None
            self._beside = (
                next((own for own in owned if own is not None), None) if is_near else None
            )
        for own in owned:
            if own is not None and own is not self._beside:
                own.close()

    def _at_hand(self) -> Database | None:
        """Return the writer's database, where its file is on this node."""
        if self._is_near and self._beside is None:
            with self._lock:
                self._beside = self._beside or Database(self._url)
        return self._beside

    def _place(self) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), _file_number(self._url)


def _sent(request: Request, again: bool) -> Request:
    return request._replace(again=again)


def dismiss(url: str) -> None:
    """End the writer of a ledger that nobody will open again; nothing happens where there is none."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(_name_of(url), namespace=NAMESPACE))


def _name_of(url: str) -> str:
    return f"ledger/{_short(f'{url} {REVISION} {_PROTOCOL}')}"


def _file_number(url: str) -> int:
    try:
        return os.stat(sa.make_url(url).database or "").st_ino
    except OSError:
        return 0


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
