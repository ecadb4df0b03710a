"""The models in service, and how others take their place."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlops_ray.errors import RequestError, ServingError
from mlops_ray.serving.models.changes import Change
from mlops_ray.serving.models.loading import ModelLoader, ModelSet
from mlops_ray.serving.models.served import ServedModels

ModelsByName = Callable[[str], Awaitable[ModelSet]]

logger = logging.getLogger("ray.serve")


class ModelsInService:
    """Holds the models of one endpoint, and those that were asked for by name.

    Args:
        loader: Loads models.
        warm: Tries new models, in a thread, before they are asked; returns what ``took`` is told.
        took: Is called in the event loop when new models take over.
        many: Returns the models of another registered name; None where there are no others.
    """

    def __init__(
        self,
        loader: ModelLoader,
        warm: Callable[[ModelSet], float],
        took: Callable[[float], None],
        many: ModelsByName | None = None,
    ) -> None:
        self._loader = loader
        self._warm = warm
        self._took = took
        self._many = many
        self._loading = asyncio.Lock()
        self.now: ModelSet | None = None
        self.refused: dict[str, Any] | None = None

    def own(self) -> ModelSet:
        """Return the endpoint's models. RequestError 503 where none is loaded yet."""
        if self.now is None:
            raise RequestError("no model is loaded yet", status=503, retry_after_s=1)
        return self.now

    async def of(self, name: str | None) -> ModelSet:
        """Return the models of a registered name, None for the endpoint's own.

        Raises:
            RequestError: 404 there is no such model here, 503 it cannot be loaded.
        """
        if name is None:
            return self.own()
        if self._many is None:
            raise RequestError(f"no model {name[:80]!r} here", status=404)
        try:
            return await self._many(name)
        except RequestError:
            raise
        except ServingError as error:
            logger.exception("%s cannot be loaded", name)
            raise RequestError(
                f"{name[:80]!r} cannot be loaded now", status=503, retry_after_s=5
            ) from error

    async def take(self, change: Change, *, again: bool = False) -> None:
        """Serve the models of a change; safe to repeat.

        The new ones are loaded, verified and tried beside those in service, which answer until then.
        Where one is broken, the old ones stay, or those ``before`` the change where there are none
        yet, and ``refused`` says why: were the error raised, Serve would stop this replica. It is
        raised only when there is nothing else to serve. What was refused is tried ``again`` only
        where that is said.
        """
        served = change.served
        async with self._loading:
            if self.now is not None and self.now.served == served:
                self.refused = None
                return
            if not again and self.refused and self.refused["epoch"] == served.epoch:
                return
            try:
                await self._load(served)
                self.refused = None
            except Exception as error:
                if self.now is None:
                    if change.before is None:
                        raise
                    await self._load(change.before)
                self.refused = {"epoch": served.epoch, "why": str(error) or type(error).__name__}
                logger.error("epoch %d is refused", served.epoch, exc_info=error)

    async def _load(self, served: ServedModels) -> None:
        with _eager_switching():
            models = await asyncio.to_thread(self._loader.load, served, self.now)
            seconds = await asyncio.to_thread(self._warm, models)
        self.now = models
        self._took(seconds)


@contextmanager
def _eager_switching() -> Iterator[None]:
    """Let a thread wait for the interpreter 0.5 ms at most, so that loading delays no answer."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)
