"""Who may call: bearer tokens with scopes and rates, checked in a few microseconds."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.files import stamp
from mlops_ray.serving.endpoint import tokens
from mlops_ray.serving.endpoint.tokens import PREFIX, Token

_SCHEME = "bearer "
_MOST_HEADERS = 1000

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls, and what they may do: the token's name, empty where no token is needed."""

    name: str = ""
    scopes: tuple[str, ...] = tokens.SCOPES

    def logged(self, wish: bytes) -> bool:
        """Return whether a request is kept in the log, given its header ``x-mlops-ray-log``.

        Raises:
            RequestError: 403, it says ``off``, and the token lacks the scope for that.
        """
        if wish.lower() != b"off":
            return True
        if "unlogged" not in self.scopes:
            raise RequestError(
                "this token has no scope 'unlogged': its requests cannot be kept out of the log",
                status=403,
            )
        return False


ANYONE = Principal()


class Guard:
    """Lets requests in, or says why not.

    Rates are kept by each replica for itself. Without a file, everyone may do everything.

    Args:
        path: The file of tokens.
        clock: Returns seconds that never go back.

    Raises:
        ServingError: The file is not there or cannot be read.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._let_in: dict[bytes, _Known] = {}
        self._seen: tuple[int, ...] | None = ()
        self._trouble = ""
        if path is not None:
            self._take(tokens.read(path))

    def check(self, authorization: bytes | None, scope: str) -> Principal:
        """Return who calls with an ``Authorization`` header, and count the request.

        Raises:
            RequestError: 401 no valid token, 403 a token without ``scope``, 429 too many requests.
        """
        if self._path is None:
            return ANYONE
        known = self._let_in.get(authorization or b"") or self._find(authorization)
        if scope not in known.token.scopes:
            raise RequestError(
                f"this token has no scope {scope!r}, only {', '.join(known.token.scopes)}",
                status=403,
            )
        known.count(self._clock())
        return known.principal

    def refresh(self) -> None:
        """Read the file again if it has changed. One that is gone allows nothing; of one that cannot
        be read, the tokens of before stay."""
        if self._path is None:
            return
        try:
            now = stamp(self._path)
            if now == self._seen:
                return
            self._take(tokens.read(self._path) if now is not None else ())
        except (OSError, ServingError) as error:
            # It is read again each time, since the next may succeed; one line says why it does not.
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.exception("the tokens stay as they were")
            return
        self._seen, self._trouble = now, ""

    def _take(self, found: tuple[Token, ...]) -> None:
        before = self._known
        self._known = {token.id: _Known(token, before.get(token.id)) for token in found}
        self._let_in = {}

    def _find(self, authorization: bytes | None) -> _Known:
        if authorization is None:
            raise RequestError("send a token: Authorization: Bearer …", status=401)
        text = authorization.decode("latin-1")
        if text[: len(_SCHEME)].lower() != _SCHEME:
            raise RequestError("the Authorization header must be: Bearer …", status=401)
        identifier, _, secret = text[len(_SCHEME) :].strip().removeprefix(PREFIX).partition("_")
        known = self._known.get(identifier)
        if known is None or not known.matches(secret.encode("latin-1")):
            raise RequestError("this token is not valid", status=401)
        if len(self._let_in) < _MOST_HEADERS:
            self._let_in[authorization] = known
        return known


class _Known:
    """A token, and how much of its rate is left."""

    __slots__ = ("_at_s", "_burst", "_digest", "_left", "principal", "token")

    def __init__(self, token: Token, before: _Known | None) -> None:
        self.token = token
        self.principal = Principal(token.name, token.scopes)
        self._digest = bytes.fromhex(token.digest)
        self._burst = float(token.burst or max(1.0, token.rate or 1.0))
        self._left = self._burst
        self._at_s = -1.0
        if before is not None and before.token == token:
            self._left, self._at_s = before._left, before._at_s

    def matches(self, secret: bytes) -> bool:
        return hmac.compare_digest(tokens.digest(self.token.salt, secret), self._digest)

    def count(self, now_s: float) -> None:
        """Take one request from the bucket. RequestError 429 where it is empty."""
        rate = self.token.rate
        if rate is None:
            return
        if self._at_s >= 0:
            self._left = min(self._burst, self._left + (now_s - self._at_s) * rate)
        self._at_s = now_s
        if self._left < 1:
            raise RequestError(
                f"token {self.token.name!r} may send {rate:g} requests a second",
                status=429,
                retry_after_s=(1 - self._left) / rate,
            )
        self._left -= 1
