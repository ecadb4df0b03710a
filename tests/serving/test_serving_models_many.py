from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from serving import shop

from mlops_ray.config.serving import Many
from mlops_ray.errors import RegistryError, RequestError, ServingError
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.serving.models import many as module
from mlops_ray.serving.models.loading import LoadedModel, ModelLoader, ModelSet
from mlops_ray.serving.models.many import ManyModels
from mlops_ray.serving.models.served import ServedModels


class Loader(ModelLoader):
    """Makes models out of nothing; ``loads`` counts them by path."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.loads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.at_once, self.most_at_once = 0, 0

    def alone(self) -> Loader:
        return self

    def load(self, served: ServedModels, current: ModelSet | None) -> ModelSet:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(10)
        time.sleep(0.01)
        self.at_once -= 1
        path = served.answer.path
        self.loads[path] += 1
        if path.endswith("broken"):
            raise ServingError("it is broken")
        service = "other" if path.endswith("foreign") else "buys"
        anything: Any = None
        model = LoadedModel(served.answer, anything, anything, "", (), service)
        return ModelSet(served, model, ())


class Shelf:
    """A registry: versions by name; ``asked`` counts look-ups."""

    def __init__(self, **versions: int) -> None:
        self.versions: dict[str, Any] = dict(versions)
        self.asked: Counter[str] = Counter()
        self.down = False

    def find(self, ref: str) -> ModelVersion | None:
        name, _, alias = ref.partition("@")
        self.asked[name] += 1
        if self.down:
            raise OSError("the registry is down")
        if " " in name:
            raise RegistryError(f"{ref!r} names no model version")
        if alias != "champion" or name not in self.versions:
            return None
        version = self.versions[name]
        kind = name if name in ("broken", "foreign") else "sound"
        return ModelVersion(
            name=name, version=version, package=f"/{name}/{version}/{kind}", digest=""
        )


class Bench:
    """Many models, and a clock that is turned by hand."""

    def __init__(self, keep: int = 2, **versions: int) -> None:
        self.shelf, self.loader, self.now_s = Shelf(**versions), Loader(), 100.0
        self.models = ManyModels(
            Many(models=("shop_*", "broken", "foreign", "with space"), keep=keep),
            self.shelf,
            self.loader,
            "buys",
            clock_s=lambda: self.now_s,
        )

    async def version(self, name: str) -> int:
        return (await self.models.get(name)).answer.spec.version

    async def settle(self) -> None:
        for _ in range(200):
            await asyncio.sleep(0.002)
            if not any(held.refreshing for held in self.models._models.values()):
                return
        raise AssertionError("a refresh does not end")


def test_a_model_is_loaded_once_when_it_is_first_asked_for():
    async def story() -> None:
        bench = Bench(shop_a=3)
        assert bench.models.held == {}
        found = await asyncio.gather(*(bench.version("shop_a") for _ in range(50)))
        assert found == [3] * 50
        assert (await bench.models.get("shop_a")).name == "shop_a"
        for _ in range(50):
            await bench.version("shop_a")
        assert bench.loader.loads == {"/shop_a/3/sound": 1}
        assert bench.shelf.asked == {"shop_a": 1}

    asyncio.run(story())


def test_the_models_that_were_used_last_are_held():
    async def story() -> None:
        bench = Bench(keep=2, shop_a=1, shop_b=2, shop_c=3)
        for name in ("shop_a", "shop_b", "shop_a", "shop_c"):
            await bench.version(name)
        assert bench.models.held == {"shop_a": 1, "shop_c": 3}
        await bench.version("shop_b")
        assert bench.models.held == {"shop_c": 3, "shop_b": 2}
        assert bench.loader.loads["/shop_b/2/sound"] == 2

    asyncio.run(story())


def test_models_are_loaded_one_at_a_time():
    async def story() -> None:
        names = {f"shop_{letter}": 1 for letter in "abcdef"}
        bench = Bench(keep=6, **names)
        await asyncio.gather(*(bench.version(name) for name in names))
        assert bench.loader.most_at_once == 1
        assert set(bench.models.held) == set(names)

    asyncio.run(story())


@pytest.mark.parametrize("name", ["elsewhere", "shop_unknown", "shop", "with space", "", "a" * 999])
def test_a_name_without_a_model_is_not_found(name):
    async def story() -> None:
        bench = Bench(shop_a=1, elsewhere=1)
        for _ in range(3):
            with pytest.raises(RequestError, match="there is no model") as caught:
                await bench.version(name)
            assert caught.value.status == 404
        assert bench.shelf.asked[name] == (1 if bench.models.serves(name) else 0)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "it is broken"), ("foreign", "needs feature service other")]
)
def test_what_cannot_be_loaded_is_not_tried_with_every_request(name, message):
    async def story() -> None:
        bench = Bench(**{name: 1})
        for _ in range(5):
            with pytest.raises(ServingError, match=message):
                await bench.version(name)
        assert sum(bench.loader.loads.values()) == 1
        bench.now_s += module.REFRESH_S
        with pytest.raises(ServingError, match=message):
            await bench.version(name)
        assert sum(bench.loader.loads.values()) == 2
        assert bench.models.held == {}

    asyncio.run(story())


def test_a_model_that_is_registered_later_is_found_after_a_while():
    async def story() -> None:
        bench = Bench()
        with pytest.raises(RequestError):
            await bench.version("shop_new")
        bench.shelf.versions["shop_new"] = 1
        with pytest.raises(RequestError):
            await bench.version("shop_new")
        bench.now_s += module.REFRESH_S
        assert await bench.version("shop_new") == 1

    asyncio.run(story())


def test_a_moved_alias_is_followed_while_the_old_version_answers():
    async def story() -> None:
        bench = Bench(shop_a=1)
        assert await bench.version("shop_a") == 1
        bench.shelf.versions["shop_a"] = 2
        assert await bench.version("shop_a") == 1
        bench.now_s += module.REFRESH_S
        bench.loader.gate.clear()
        assert [await bench.version("shop_a") for _ in range(20)] == [1] * 20
        await asyncio.sleep(0.02)
        assert await bench.version("shop_a") == 1
        bench.loader.gate.set()
        await bench.settle()
        assert await bench.version("shop_a") == 2
        assert bench.shelf.asked["shop_a"] == 2
        bench.now_s += module.REFRESH_S
        await bench.version("shop_a")
        await bench.settle()
        assert bench.loader.loads["/shop_a/2/sound"] == 1

    asyncio.run(story())


@pytest.mark.parametrize("trouble", ["down", "gone", "foreign"])
def test_a_model_goes_on_when_its_successor_cannot_be_had(trouble, monkeypatch):
    async def story() -> None:
        bench = Bench(shop_a=1)
        await bench.version("shop_a")
        if trouble == "down":
            bench.shelf.down = True
        elif trouble == "gone":
            del bench.shelf.versions["shop_a"]
        else:
            moved = ModelVersion(name="shop_a", version=2, package="/x/foreign", digest="")
            monkeypatch.setattr(bench.shelf, "find", lambda ref: moved)
        for _ in range(3):
            bench.now_s += module.REFRESH_S
            assert await bench.version("shop_a") == 1
            await bench.settle()
        assert bench.models.held == {"shop_a": 1}

    asyncio.run(story())


def test_a_registry_that_fails_is_no_missing_model():
    async def story() -> None:
        bench = Bench(shop_a=1)
        bench.shelf.down = True
        with pytest.raises(ServingError, match="the registry is down") as caught:
            await bench.version("shop_a")
        assert not isinstance(caught.value, RequestError)

    asyncio.run(story())


def test_a_request_that_is_given_up_does_not_end_the_loading_for_others():
    async def story() -> None:
        bench = Bench(shop_a=1)
        bench.loader.gate.clear()
        hasty = asyncio.create_task(bench.version("shop_a"))
        patient = asyncio.create_task(bench.version("shop_a"))
        await asyncio.sleep(0.02)
        hasty.cancel()
        bench.loader.gate.set()
        assert await patient == 1
        assert hasty.cancelled()
        assert sum(bench.loader.loads.values()) == 1

    asyncio.run(story())


def test_refusals_that_are_remembered_have_a_bound(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED_REFUSALS", 10)

    async def story() -> None:
        bench = Bench()
        for number in range(30):
            with pytest.raises(RequestError):
                await bench.version(f"shop_{number}")
        assert len(bench.models._refused) == 10

    asyncio.run(story())


def test_real_packages_answer_and_those_with_other_features_do_not(packages: list[Path]):
    class Registry:
        def find(self, ref: str) -> ModelVersion | None:
            path = packages[4] if ref.startswith("shop_strange") else packages[1]
            return ModelVersion(name="m", version=7, package=str(path), digest="")

    async def story() -> None:
        loader = ModelLoader(*feature_columns(shop.features(), "buys"), remotes={"champion": None})
        models = ManyModels(Many(models=("shop_*",)), Registry(), loader, "buys")
        found = await models.get("shop_a")
        assert found.answer.spec.version == 7
        assert found.answer.form != "remote"
        with pytest.raises(ServingError, match="moon_phase"):
            await models.get("shop_strange")

    asyncio.run(story())


def test_names_that_are_not_there_keep_nobody_else_waiting():
    async def story() -> None:
        bench = Bench(shop_a=1)
        gate, seen = threading.Event(), bench.shelf.find

        def slow(ref: str) -> ModelVersion | None:
            gate.wait(10)
            return seen(ref)

        bench.shelf.find = slow  # type: ignore[method-assign]
        calls = [asyncio.create_task(bench.version(f"shop_{n}")) for n in range(400)]
        await asyncio.sleep(0.05)
        late = [call for call in calls if call.done()]
        assert len(late) == 400 - module.WAITING_LOOKUPS
        for call in late:
            refused = call.exception()
            assert isinstance(refused, RequestError)
            assert (refused.status, refused.retry_after_s) == (503, 1.0)
        await asyncio.wait_for(asyncio.to_thread(bool), 5)
        gate.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        statuses = [error.status for error in found if isinstance(error, RequestError)]
        assert statuses.count(404) == module.WAITING_LOOKUPS
        assert await bench.version("shop_a") == 1

    asyncio.run(story())
