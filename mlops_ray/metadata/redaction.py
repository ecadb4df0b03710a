"""Addresses without their passwords, for errors and logs."""

from __future__ import annotations

import re
from urllib.parse import unquote

_HIDDEN = "***"
# A password may hold what should have been escaped: up to the last @, then.
_USER = re.compile(r"(?<=://)(?:[^\s/:@]*:\S*|[^\s/@]*)@")
_OPTION = re.compile(
    r"(?i)([\w.-]*(?:password|passwd|pwd|secret|token|access_key|account_key|signature)[\w.-]*=)"
    r"[^&\s'\"]+"
)
_LEAST_LETTERS = 3


def redacted(text: str, url: str = "") -> str:
    """Return text without the passwords of the addresses in it.

    Args:
        text: An address, or a message that may hold one.
        url: The address that the message is about: of its password not even a part is left, as
            where another program has cut the address up in another way.
    """
    text = _OPTION.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
    for secret in _secrets(url):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(url: str) -> list[str]:
    """Return the password of an address and the parts that it may be cut into, longest first."""
    user, at, _ = url.partition("://")[2].rpartition("@")
    password = user.partition(":")[2] if at else ""
    found = {password, unquote(password)}
    found |= {match[0].partition("=")[2] for match in _OPTION.finditer(url)}
    found |= {part for whole in tuple(found) for part in re.split(r"[@/:?#]", whole)}
    return sorted((s for s in found if len(s) >= _LEAST_LETTERS), key=len, reverse=True)
