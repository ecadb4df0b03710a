"""What a database refuses, in words; and what of it can be tried again."""

from __future__ import annotations

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.redaction import redacted

_LOST = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "25P03"})
"""SQLSTATEs of transactions that were rolled back through no fault of theirs."""

_REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf entry", "permission denied")
"""What a server says, without a SQLSTATE, to those whom it does not let in."""

_TAKEN = "23505"


def explained(error: Exception, url: str) -> LedgerError:
    """Say in words what the database at a URL refuses, and what to do about it."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
    what, fix = _advice(code, cause)
    return LedgerError(what, where=redacted(url), why=redacted(lines[0], url), fix=fix)


_LOCKED_OUT = (
    "the ledger's database server does not let us in",
    "check user, password and database in MLOPS_RAY_LEDGER",
)
_ADVICE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED", "55P03"),
        "the ledger is locked by another process",
        "find who has the file open (fuser on it), end that process or wait for it, and run the "
        "same command again",
    ),
    (
        ("SQLITE_FULL", "SQLITE_IOERR", "53100", "58030"),
        "the ledger cannot be written to its disk",
        "free some space or check the disk, then run the same command again: what was written "
        "before is there",
    ),
    (
        ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "25006"),
        "the ledger cannot be opened for writing",
        "make its folder and file writable for this user, or set MLOPS_RAY_HOME to another folder",
    ),
    (
        ("SQLITE_CORRUPT", "SQLITE_NOTADB"),
        "the ledger's file is damaged, or is no ledger",
        "put a copy of it back, or save what is left with `sqlite3 ledger.db .recover`; to begin "
        "anew, set MLOPS_RAY_HOME to another folder",
    ),
    (("28", "3D000", "42501"), *_LOCKED_OUT),
)


def _advice(code: str, cause: Exception) -> tuple[str, str]:
    for codes, what, fix in _ADVICE:
        if code and code.startswith(codes):
            return what, fix
    if isinstance(cause, ImportError):
        return "the ledger's database needs a driver", "pip install 'mlops-ray[postgres]'"
    if isinstance(cause, OSError):
        return (
            "the ledger's folder cannot be used",
            "make it writable for this user, or set MLOPS_RAY_HOME to another folder",
        )
    if type(cause).__module__.startswith("psycopg") and not code:
        return (
            _LOCKED_OUT
            if _is_refused(cause)
            else (
                "the ledger's database server cannot be reached",
                "check that it runs and that MLOPS_RAY_LEDGER names it, then run the same command again",
            )
        )
    return "the ledger's database refuses", "see why; the rest of the ledger is unharmed"


def is_lost(error: Exception) -> bool:
    """Say whether a server went away, or undid a transaction that can be tried again."""
    cause = getattr(error, "orig", None)
    if cause is None or not type(cause).__module__.startswith("psycopg"):
        return False
    code = getattr(cause, "sqlstate", None)
    if code == _TAKEN:
        # The same request, sent over a connection that broke, was being committed meanwhile.
        return "requests_pkey" in str(cause)
    if code is not None:
        return code in _LOST or code.startswith("08")
    is_operational = any(base.__name__ == "OperationalError" for base in type(cause).__mro__)
    return is_operational and not _is_refused(cause)


def _is_refused(cause: BaseException) -> bool:
    return any(text in str(cause) for text in _REFUSED)
