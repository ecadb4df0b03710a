"""Owning a workflow instance: a lease that is taken, kept, and known to be lost in time."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from mlops_ray.errors import LeaseError, LedgerError, WorkflowError
from mlops_ray.metadata.digest import digest_bytes
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, RunRecord
from mlops_ray.orchestration.retries import headline
from mlops_ray.orchestration.spec import instance_name

LEASE_TTL_S = 15.0
_RENEW_EVERY_S = 4.0
_LOOK_EVERY_S = 1.0


def owner_name() -> str:
    """Return a name for this owner that says which process it is: ``host:pid:start:number``."""
    start = _process_start(os.getpid())
    return f"{_machine()}:{os.getpid()}:{start}:{secrets.token_hex(2)}"


def is_gone(owner: str) -> bool:
    """Say whether an owner's process is known to be dead. False where that cannot be known."""
    machine, pid, start, *_ = (*owner.rsplit(":", 3), "", "", "")
    return machine == _machine() and pid.isdigit() and _process_start(int(pid)) != start


def take(ledger: Ledger, name: str) -> Lease:
    """Take the lease of a workflow instance: at once where it is free or its owner is known to be
    dead; where its owner may be alive on another machine, as soon as it was not renewed in time.

    Raises:
        WorkflowError: A living process owns it.
    """
    owner = owner_name()
    first: Lease | None = None
    dead: Lease | None = None
    while True:
        try:
            return ledger.acquire(name, owner, LEASE_TTL_S, dead=dead)
        except LeaseError as error:
            held: Lease = error.lease
        if is_gone(held.owner):
            dead = held
            continue
        same_machine = held.owner.startswith(f"{_machine()}:")
        renewed = first is not None and held.expires_at != first.expires_at
        if same_machine or renewed:
            raise WorkflowError(
                f"{name.rpartition('/')[0]} is being run already",
                where=held.owner,
                fix="wait for it, follow it with `mlops-ray status`, or stop it with "
                "`mlops-ray cancel RUN`",
            )
        first = held
        _wait_until(held.expires_at)


@contextlib.contextmanager
def borrowed(ledger: Ledger, run: RunRecord) -> Iterator[Lease]:
    """Own the instance of a run for a moment, so that nothing runs it meanwhile.

    Raises:
        LeaseError: A process owns it that may be alive.
    """
    name = instance_name(run.project, run.workflow, run.config_digest)
    held = ledger.lease(name)
    dead = held if held is not None and is_gone(held.owner) else None
    lease = ledger.acquire(name, owner_name(), LEASE_TTL_S, dead=dead)
    try:
        yield lease
    finally:
        ledger.release(lease)


def _wait_until(moment: datetime) -> None:
    left_s = (moment - datetime.now(UTC)).total_seconds()
    time.sleep(min(max(left_s, 0.05), 1.0))


class Keeper:
    """A thread that keeps a lease renewed and looks around meanwhile.

    Args:
        ledger: Where the lease is.
        lease: Ours.
        lost: Called once, with the reason, when the lease is no longer ours or may not be: another
            owner took it, the ledger could not be reached for as long as the lease lasts, or the
            keeper itself failed.
        look: Called about once a second; it may read the ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        lease: Lease,
        *,
        lost: Callable[[LedgerError], None],
        look: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._lease = lease
        self._lost = lost
        self._look = look
        self._ended = threading.Event()
        self._renewed_s = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop renewing; the lease stays as it is."""
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        tried_s = time.monotonic()
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                if time.monotonic() - tried_s >= _RENEW_EVERY_S:
                    tried_s = time.monotonic()
                    self._lease = self._ledger.renew(self._lease, LEASE_TTL_S)
                    self._renewed_s = tried_s
                self._look()
            except LeaseError as error:
                self._lost(error)
                return
            except LedgerError as error:
                if time.monotonic() - self._renewed_s > LEASE_TTL_S:
                    self._lost(error)
                    return
            except Exception as error:
                what = "the lease can no longer be kept"
                self._lost(LedgerError(what, where=self._lease.name, why=headline(error)))
                return


@lru_cache(maxsize=1)
def _machine() -> str:
    """Name this machine, this boot of it, and the process numbers' namespace: where a process
    number means the same process."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{digest_bytes(f'{boot}{namespace}'.encode())[:6]}"


def _process_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; "" when there is none."""
    stat = _read(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if stat else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
