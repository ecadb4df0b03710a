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
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ActorHandleNotFoundError, GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.database import PATIENCE_S, Database
from mlops_ray.metadata.operations import Request
from mlops_ray.metadata.schema import REVISION

NAMESPACE = "mlops_ray"
_PROTOCOL = 1
"""Changes with what clients and writer say to each other: a writer outlives the jobs of a cluster."""

_CALLS_AT_ONCE = 32
_MOST_IN_ONE_COMMIT = 64
_ANSWER_S = 2 * PATIENCE_S
_LONGEST_PAUSE_S = 0.5


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
    """A database behind the cluster's writer. Calls wait while the writer is being restarted.

    The process that starts the writer goes on by itself until the writer answers; so does one whose
    connection to Ray has ended.

    Args:
        url: SQLAlchemy URL of a SQLite file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = f"ledger/{_short(f'{url} {REVISION} {_PROTOCOL}')}"
        self._lock = threading.Lock()
        self._own: Database | None = None
        self.actor = self._find()

    def write(self, operation: str, *arguments: Any) -> Any:
        """Do an operation in one transaction; on return it is durable.

        Raises:
            LedgerError: The database refuses, or the writer does not answer.
        """
        if (own := self._directly()) is not None:
            return own.write(operation, *arguments)
        request = Request(operation, arguments, uuid.uuid4().hex)
        return self._ask(lambda actor, again: actor.write.remote(request._replace(again=again)))

    def read(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Return the rows of a query.

        Raises:
            LedgerError: The database refuses, or the writer does not answer.
        """
        if (own := self._directly()) is not None:
            return own.read(query, *arguments)
        found: list[dict[str, Any]] = self._ask(
            lambda actor, _again: actor.read.remote(query, arguments)
        )
        return found

    def close(self) -> None:
        """Close the connections of this process; the writer keeps its own."""
        with self._lock:
            if self._own is not None:
                self._own.close()

    def _ask(self, send: Any) -> Any:
        deadline, pause, again = time.monotonic() + PATIENCE_S, 0.02, False
        while True:
            try:
                reply = ray.get(send(self.actor, again), timeout=_ANSWER_S)
                break
            except (RayActorError, GetTimeoutError, ActorHandleNotFoundError) as error:
                if time.monotonic() > deadline:
                    raise self._silent(error) from error
            again = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self.actor = self._find()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _silent(self, error: Exception) -> LedgerError:
        lines = str(error).splitlines() or [type(error).__name__]
        return LedgerError(
            "the ledger's writer does not answer",
            where=f"actor {self._name}, {self._url}",
            why=lines[0],
            fix="see whether the cluster is well (`ray status`), then run the same command again",
        )

    def _directly(self) -> Database | None:
        if self._own is None and not ray.is_initialized():
            with self._lock:
                self._own = self._own or Database(self._url)
        return self._own

    def _find(self) -> Any:
        with contextlib.suppress(ValueError):
            return ray.get_actor(self._name, namespace=NAMESPACE)
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
            actor = options.remote(self._url, node)
        except ValueError:
            # Another process was faster.
            return ray.get_actor(self._name, namespace=NAMESPACE)
        self._begin_directly(actor)
        return actor

    def _begin_directly(self, actor: Any) -> None:
        with self._lock:
            self._own = self._own or Database(self._url)
        actor.pid.remote().future().add_done_callback(self._leave_to_writer)

    def _leave_to_writer(self, _done: Any) -> None:
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            own.close()


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
