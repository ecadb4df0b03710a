"""Many models behind one endpoint, loaded when they are first asked for."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from fnmatch import translate
from typing import Protocol

from mlops_ray.config.serving import Many
from mlops_ray.errors import RegistryError, RequestError, ServingError
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.serving.models.loading import ModelLoader, ModelSet
from mlops_ray.serving.models.served import ModelSpec, ServedModels

REFRESH_S = 5.0
"""How long a model is answered with before the registry is asked whether its alias has moved."""

WAITING_LOOKUPS = 64
"""Names that may wait to be looked up; with more, requests for further ones are refused."""

_REMEMBERED_REFUSALS = 1024
_LOOKUP_THREADS = 2

logger = logging.getLogger("ray.serve")


class Versions(Protocol):
    """The part of the model registry that is needed here."""

    def find(self, ref: str) -> ModelVersion | None:
        """Return what ``name@alias`` names, or None."""


@dataclass(eq=False)
class _Held:
    models: ModelSet
    checked_s: float
    refreshing: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class _Refusal:
    error: ServingError
    until_s: float


class ManyModels:
    """The models of one endpoint by registered name; the ``keep`` that were used last are held.

    A model that is asked for and not held is loaded in a thread, once for all that wait for it. One
    that is held answers at once; every few seconds of use, a task beside the requests looks whether
    its alias has moved, and the old version answers until the new one is loaded. What cannot be had
    is not tried again for as long. All of it belongs to one event loop.

    Args:
        many: Which models there may be, and how many are held.
        registry: Where names are looked up.
        loader: The endpoint's own; what does not fit the endpoint's features is refused.
        service: The endpoint's feature service.
        clock_s: The time.
    """

    def __init__(
        self,
        many: Many,
        registry: Versions,
        loader: ModelLoader,
        service: str,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pattern = re.compile("|".join(translate(model) for model in many.models) or r"(?!)")
        self._many = many
        self._registry = registry
        self._loader = loader.alone()
        self._service = service
        self._clock_s = clock_s
        self._models: OrderedDict[str, _Held] = OrderedDict()
        self._loading: dict[str, asyncio.Task[ModelSet]] = {}
        self._refused: OrderedDict[str, _Refusal] = OrderedDict()
        # Threads of its own: whoever asks for names that are not there keeps nobody else's work waiting.
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._sought: set[str] = set()
        # One at a time: each that is being loaded is one more than are held.
        self._turn = asyncio.Lock()

    @property
    def held(self) -> dict[str, int]:
        """Versions by name, of the models that are in memory, the last used one last."""
        return {name: held.models.answer.spec.version for name, held in self._models.items()}

    def serves(self, name: str) -> bool:
        """Say whether there may be a model of this name."""
        return self._pattern.match(name) is not None

    async def get(self, name: str) -> ModelSet:
        """Return the model that answers for ``name``; it has neither challengers nor shadows.

        Raises:
            RequestError: 404, there is no such model here; 503, too many are asked for at once.
            ServingError: It cannot be loaded.
        """
        held = self._models.get(name)
        if held is None:
            return await self._fetch(name)
        self._models.move_to_end(name)
        if held.refreshing is None and self._clock_s() - held.checked_s >= REFRESH_S:
            held.refreshing = asyncio.create_task(self._refresh(name, held))
        return held.models

    async def _fetch(self, name: str) -> ModelSet:
        if not self.serves(name):
            raise _unknown(name)
        refusal = self._refused.get(name)
        if refusal is not None and self._clock_s() < refusal.until_s:
            raise copy(refusal.error)
        task = self._loading.get(name)
        if task is None:
            if len(self._sought) >= WAITING_LOOKUPS:
                raise RequestError(
                    "too many models are asked for at once", status=503, retry_after_s=1.0
                )
            self._sought.add(name)
            task = self._loading[name] = asyncio.create_task(self._load_first(name))
        # Others wait for the same task: a request that is given up must not end it.
        return await asyncio.shield(task)

    async def _load_first(self, name: str) -> ModelSet:
        try:
            models = await self._load(name, await self._look_up(name), None)
            self._refused.pop(name, None)
            self._models[name] = _Held(models, self._clock_s())
            while len(self._models) > self._many.keep:
                self._models.popitem(last=False)
            return models
        except ServingError as error:
            self._refuse(name, error)
            raise
        except Exception as error:
            refusal = _unreachable(name, error)
            self._refuse(name, refusal)
            raise refusal from error
        finally:
            del self._loading[name]

    async def _refresh(self, name: str, held: _Held) -> None:
        try:
            found = await self._look_up(name)
            if found != held.models.answer.spec:
                held.models = await self._load(name, found, held.models)
        except Exception as error:
            version = held.models.answer.spec.version
            logger.error("model %s goes on as version %d: %s", name, version, error)
        finally:
            held.checked_s, held.refreshing = self._clock_s(), None

    async def _look_up(self, name: str) -> ModelSpec:
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._lookups, self._find, name)
        finally:
            self._sought.discard(name)

    def _find(self, name: str) -> ModelSpec:
        try:
            found = self._registry.find(f"{name}@{self._many.alias}")
        except RegistryError as error:
            # What cannot be a name has no model.
            raise _unknown(name) from error
        if found is None:
            raise _unknown(name)
        return ModelSpec(alias=self._many.alias, version=found.version, path=found.package)

    async def _load(self, name: str, spec: ModelSpec, current: ModelSet | None) -> ModelSet:
        async with self._turn:
            served = ServedModels(answer=spec)
            models = await asyncio.to_thread(self._loader.load, served, current)
        service = models.answer.service
        if service != self._service:
            raise ServingError(
                f"this model needs feature service {service}, the endpoint has {self._service}",
                where=spec.path,
                fix="serve it by an endpoint of that service",
            )
        return replace(models, name=name)

    def _refuse(self, name: str, error: ServingError) -> None:
        # A copy has no traceback, whose frames would keep the model that was being loaded.
        self._refused[name] = _Refusal(copy(error), self._clock_s() + REFRESH_S)
        self._refused.move_to_end(name)
        while len(self._refused) > _REMEMBERED_REFUSALS:
            self._refused.popitem(last=False)


def _unreachable(name: str, error: Exception) -> ServingError:
    return ServingError(
        f"the registry could not be asked for model {name}",
        why=str(error) or type(error).__name__,
        fix="try again; the registry is in the home's folder, or where tracking points to",
    )


def _unknown(name: str) -> RequestError:
    return RequestError(f"there is no model {name[:80]!r} here", status=404)
