"""Models that take the place of the declared ones, in every replica and in those that start later."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from serving import shop
from serving.harness import LocalShop, open_local

from mlops_ray.config.serving import Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint import endpoint as endpoints
from mlops_ray.serving.models.changes import Changes
from mlops_ray.serving.models.served import ModelSpec, ServedModels


def served(version: int, epoch: int) -> ServedModels:
    return ServedModels(
        answer=ModelSpec(alias="champion", version=version, path=f"/{version}"), epoch=epoch
    )


def test_a_change_belongs_to_what_was_declared(tmp_path: Path) -> None:
    changes = Changes(Home(tmp_path), "shop")
    first, second = served(1, 10), served(2, 11)
    assert changes.latest(first) == first
    assert changes.stamp is None
    changes.keep(first, second)
    stamp = changes.stamp
    assert Changes(Home(tmp_path), "shop").latest(first) == second
    # Whoever declares anew means that.
    assert changes.latest(served(3, 12)) == served(3, 12)
    assert Changes(Home(tmp_path), "other").latest(first) == first
    changes.keep(first, served(3, 13))
    assert changes.stamp != stamp
    assert changes.latest(first) == served(3, 13)


@pytest.mark.parametrize("content", [b"", b"{", b'{"of": 10}', b"\xff"])
def test_a_file_that_is_no_change_is_passed_over(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path)
    changes = Changes(home, "shop")
    changes.keep(served(1, 10), served(2, 11))
    home.served("shop").write_bytes(content)
    logging.disable(logging.CRITICAL)
    assert changes.latest(served(1, 10)) == served(1, 10)
    logging.disable(logging.NOTSET)


@pytest.fixture
def changed(shop_home: Home, packages: list[Path], tmp_path: Path) -> Any:
    """Opens replicas of the shop, and changes what they serve."""

    class Changed:
        home = Home(tmp_path / "home")
        declared: dict[str, Any]

        def replica(self) -> LocalShop:
            local = open_local(shop_home, packages, self.home, Serving())
            self.declared = local.config(1)
            return local

        def keep(self, version: int) -> None:
            declared = ServedModels.parse(self.declared)
            answer = declared.answer
            path = str(packages[version - 1])
            spec = answer.model_copy(update={"version": version, "path": path})
            update = {"answer": spec, "epoch": 100 + version}
            Changes(self.home, "shop").keep(declared, declared.model_copy(update=update))

    return Changed()


async def version(local: LocalShop) -> int:
    return int((await local.predict([shop.ROW]))["version"])


def test_replicas_adopt_changes_and_start_with_them(changed: Any) -> None:
    async def test() -> None:
        first = changed.replica()
        await first.endpoint.adopt()
        await first.endpoint.reconfigure(changed.declared)
        assert await version(first) == 1
        changed.keep(2)
        assert await version(first) == 1
        await first.endpoint.adopt()
        assert await version(first) == 2
        # Serve repeats what is declared, and starts replicas with it.
        await first.endpoint.reconfigure(changed.declared)
        second = changed.replica()
        await second.endpoint.reconfigure(changed.declared)
        assert [await version(first), await version(second)] == [2, 2]
        assert first.endpoint.describe()["epoch"] == second.endpoint.describe()["epoch"] == 102
        await first.endpoint.reconfigure(first.config(3, epoch=200))
        assert await version(first) == 3

    asyncio.run(test())


def test_a_broken_change_leaves_the_old_models(changed: Any) -> None:
    async def test() -> None:
        local = changed.replica()
        await local.endpoint.reconfigure(changed.declared)
        changed.keep(4)
        logging.disable(logging.CRITICAL)
        await local.endpoint.adopt()
        logging.disable(logging.NOTSET)
        assert local.endpoint.describe()["refused"]["epoch"] == 104
        assert await version(local) == 1
        changed.keep(1)
        await local.endpoint.adopt()
        assert local.endpoint.describe()["refused"] is None

    asyncio.run(test())


def test_a_replica_looks_for_changes_by_itself(
    changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "_FOLLOW_EVERY_S", 0.01)

    async def test() -> None:
        local = changed.replica()
        await local.endpoint.reconfigure(changed.declared)
        await local.endpoint.start()
        for wanted in (2, 3, 1):
            changed.keep(wanted)
            async with asyncio.timeout(30):
                while local.endpoint.describe()["epoch"] != 100 + wanted:
                    await asyncio.sleep(0.01)
            assert await version(local) == wanted
        await local.endpoint.stop()

    asyncio.run(test())
