"""Errors of other processes, which Ray hands over as the text of a traceback."""

from __future__ import annotations

import re

_OWN_ERROR_LINE = re.compile(r"^mlops_ray\.errors\.\w+: ", re.MULTILINE)
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): ", re.MULTILINE)
_CHAINED = re.compile(r"\n\s*\n(?=The above exception|During handling|\S*ray::)")


def root_cause(text: str) -> str:
    """Return the message of the error that says most: our own last one, else what began it all.

    A text that names no error comes back as it is, cut to its end.
    """
    own = list(_OWN_ERROR_LINE.finditer(text))
    found = own[-1] if own else _ERROR_LINE.search(text)
    if found is None:
        return text.strip()[-1000:]
    return _CHAINED.split(text[found.end() :], maxsplit=1)[0].strip()
