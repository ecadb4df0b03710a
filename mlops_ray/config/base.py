"""What all configuration models share: frozen, strict about keys, durations, components."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.functional_serializers import PlainSerializer

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)\s*")


class Frozen(BaseModel):
    """Base of every configuration model: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def parse_duration(value: Any) -> Any:
    """Turn ``"90s"``, ``"6h"``, ``"28d"`` or a number of seconds into a timedelta."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError(f"{value!r} is not a duration; write for example 90s, 6h or 28d")
        return timedelta(seconds=float(match[1]) * _UNITS[match[2]])
    if isinstance(value, int | float) and not isinstance(value, bool):
        return timedelta(seconds=value)
    return value


def format_duration(value: timedelta) -> str:
    """Write a timedelta in the largest unit that divides it: ``timedelta(days=7)`` → ``"7d"``."""
    seconds = value.total_seconds()
    for unit in ("d", "h", "m"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    text = f"{seconds:.6f}".rstrip("0").rstrip(".")
    return f"{text}s"


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Duration = Annotated[
    timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)
]
"""A length of time, written ``90s``, ``6h`` or ``28d``."""

Instant = Annotated[datetime, AfterValidator(_utc)]
"""A moment; one without a time zone is UTC."""

Target = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
"""The dotted name of a function or class, such as ``flights.data.read_flights``."""


class Component(Frozen):
    """Something built by calling ``_target_`` with the other keys as arguments."""

    target: Target = Field(alias="_target_")
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _collect_arguments(cls, value: Any) -> Any:
        if not isinstance(value, dict) or set(value) <= {"target", "arguments"}:
            return value
        known = {name: value[name] for name in ("_target_", "target") if name in value}
        return known | {"arguments": {k: v for k, v in value.items() if k not in known}}

    def with_arguments(self, **changes: Any) -> Self:
        """Return the same component with some arguments replaced."""
        return self.model_copy(update={"arguments": self.arguments | changes})
