"""Declarations of what starts workflows by itself: schedules, and things that happen."""

from __future__ import annotations

import difflib
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from mlops_ray.config.base import Duration, Frozen
from mlops_ray.config.workflow import Backoff

ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
MOMENT = "{at}"
"""What stands in an override for the moment of the occasion."""

OWN_EVENTS = ("firing_", "run_", "step_", "effect_", "job_", "trigger", "mirrored")
"""How kinds of events begin that every trigger's firing or run makes."""

SOURCES = ("cron", "data", "commit", "after", "event", "drift", "performance", "webhook")
_FIELDS = 5
_NO_SCHEDULE = ("UTC", "latest", timedelta(0))
_SOME_DAY = datetime(2000, 1, 1)


def _checked_cron(value: str) -> str:
    text = ALIASES.get(value.strip().lower(), value)
    if text.startswith("@"):
        raise ValueError(f"there is no {value}; there are: {', '.join(ALIASES)}")
    if len(text.split()) != _FIELDS:
        raise ValueError("write five fields: minute, hour, day of month, month, day of week")
    try:
        next(CronSim(text, _SOME_DAY))
    except CronSimError as error:
        raise ValueError(f"this is no cron expression: {error}") from error
    except StopIteration:
        raise ValueError("no day ever fits") from None
    return value


def _checked_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (KeyError, OSError, ValueError):
        close = difflib.get_close_matches(value, available_timezones(), n=1)
        hint = f". Did you mean {close[0]}?" if close else "; write for example Europe/Berlin"
        raise ValueError(f"there is no time zone {value!r}{hint}") from None
    return value


def _as_configured(value: Any) -> Any:
    return {} if value is True else value


class RunEnd(Frozen):
    """The end of a run of another workflow. ``any``: succeeded, failed or cancelled."""

    workflow: str
    status: Literal["succeeded", "failed", "any"] = "succeeded"


class DriftBound(Frozen):
    """Drift that the endpoint's monitor has measured; what is None is as in ``monitoring.drift``."""

    threshold: float | None = Field(default=None, gt=0)
    min_features: int | None = Field(default=None, ge=1)


class PerformanceBound(Frozen):
    """Labelled error that the endpoint's monitor has measured, against the model's evaluation.

    What is None is as in ``monitoring.performance``.
    """

    max_auc_drop: float | None = Field(default=None, gt=0)
    max_log_loss_rise: float | None = Field(default=None, gt=0)


class Trigger(Frozen):
    """When to run a workflow. At most one of the sources is given; without any it is fired by hand.

    Sources: ``cron`` in a ``timezone``; ``data``: rows were added to a feature view; ``commit``: a
    branch of the project's repository has a new head; ``after``: a run of another workflow ended;
    ``event``: the ledger has a new event of this kind; ``drift`` and ``performance``: the monitor of
    the endpoint measured more than the bound (``true``: the bounds of ``monitoring``); ``webhook``:
    a signed HTTP request.

    A time of a schedule that a change of clocks leaves out counts right after the gap, one that
    comes twice counts once; where minute or hour begin with ``*`` every real occurrence counts.
    ``catch_up`` says what becomes of times that passed while nothing watched: ``none``, the
    ``latest``, or ``all`` of the last ``catch_up_most``. ``jitter`` delays each by up to so much.

    ``overlap`` says what becomes of a firing while an earlier one's job is not over: ``skip`` it,
    ``queue`` it, ``cancel`` the earlier, or ``allow`` both. None: ``skip`` for schedules, else
    ``queue``. Firings of different triggers that run the same wait for each other.

    With ``debounce`` a firing waits until nothing new came for so long; with ``min_interval`` it
    waits until so long after the last start; of those that wait, the newest goes.

    A job that fails is tried ``retries`` times more; each goes on from the run's finished steps.
    ``overrides`` may hold ``{at}``, the moment of the occasion.
    """

    workflow: str
    overrides: tuple[str, ...] = ()
    cron: Annotated[str, AfterValidator(_checked_cron)] | None = None
    timezone: Annotated[str, AfterValidator(_checked_zone)] = "UTC"
    catch_up: Literal["none", "latest", "all"] = "latest"
    catch_up_most: int = Field(default=10, ge=1, le=1000)
    jitter: Duration = timedelta(0)
    data: str | None = None
    commit: str | None = Field(default=None, pattern=r"^[^-\s][^\s]*$")
    after: RunEnd | None = None
    event: str | None = None
    drift: Annotated[DriftBound, BeforeValidator(_as_configured)] | None = None
    performance: Annotated[PerformanceBound, BeforeValidator(_as_configured)] | None = None
    webhook: bool = False
    overlap: Literal["skip", "queue", "cancel", "allow"] | None = None
    debounce: Duration = timedelta(0)
    min_interval: Duration = timedelta(0)
    paused: bool = False
    retries: int = Field(default=0, ge=0)
    backoff: Backoff = Backoff(first=timedelta(seconds=30), most=timedelta(minutes=10))

    @field_validator("event")
    @classmethod
    def _not_of_its_own(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(OWN_EVENTS):
            raise ValueError(
                f"what a trigger starts makes events {value} too, so it would start itself for ever; "
                "for the end of a run there is `after`"
            )
        return value

    @field_validator("overrides")
    @classmethod
    def _not_the_workflow(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(text.lstrip("+").startswith(("workflow=", "home=")) for text in value):
            raise ValueError("workflow has a key of its own, and home is the trigger's project's")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}; declare a trigger for each")
        if self.cron is None and (self.timezone, self.catch_up, self.jitter) != _NO_SCHEDULE:
            raise ValueError("timezone, catch_up and jitter are for triggers with cron")
        if self.catch_up == "all" and self.when_busy in ("skip", "cancel"):
            raise ValueError("catch_up: all needs overlap: queue or allow, else most would be lost")
        if self.overlap == "allow" and not self.makes_runs_of_its_own:
            raise ValueError(
                "overlap: allow needs an override that differs each time, such as until={at}: "
                "of two runs of the same configuration only one can be under way"
            )
        return self

    @property
    def source(self) -> str:
        """The name of the source; ``hand`` where there is none."""
        return next((n for n in SOURCES if getattr(self, n) not in (None, False)), "hand")

    @property
    def when_busy(self) -> str:
        """What becomes of a firing while an earlier one's job is not over."""
        return self.overlap or ("skip" if self.cron else "queue")

    @property
    def makes_runs_of_its_own(self) -> bool:
        """Whether no two of its firings run the same configuration."""
        return any(MOMENT in text for text in self.overrides)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds of a drift or performance trigger that differ from those of ``monitoring``."""
        given = self.drift or self.performance
        return given.model_dump(exclude_none=True) if given else {}


class Webhook(Frozen):
    """Where signed requests come in: ``POST /hooks/<trigger>``.

    ``secret`` names the environment variable that holds the secret; it is not the secret itself.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8787, ge=0, le=65535)
    secret: str = Field(default="MLOPS_RAY_WEBHOOK_SECRET", pattern=r"^[A-Z_][A-Z0-9_]*$")
    body_bytes: int = Field(default=2**20, ge=1)
