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
from mlops_ray.errors import MlopsRayError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint import endpoint as endpoints
from mlops_ray.serving.models.changes import Change, Changes
from mlops_ray.serving.models.served import ModelSpec, ServedModels


def served(version: int, epoch: int) -> ServedModels:
    return ServedModels(
        answer=ModelSpec(alias="champion", version=version, path=f"/{version}"), epoch=epoch
    )


def test_a_change_belongs_to_what_was_declared(tmp_path: Path) -> None:
    changes = Changes(Home(tmp_path), "shop")
    first, other = served(1, 10), served(3, 12)
    assert changes.read(first) is None
    assert changes.stamp(first) is None
    changes.keep(first, Change(served=served(2, 11), before=first))
    stamp = changes.stamp(first)
    found = Changes(Home(tmp_path), "shop").read(first)
    assert found == Change(served=served(2, 11), before=first)
    assert found.good == first
    # Whoever declares anew means that; another cluster may declare something else in the same home.
    assert changes.read(other) is None
    changes.keep(other, Change(served=served(5, 13)))
    assert changes.read(first) == found
    assert changes.stamp(first) == stamp
    assert Changes(Home(tmp_path), "other").read(first) is None
    changes.keep(first, Change(served=served(2, 11)))
    assert changes.stamp(first) != stamp
    changes.forget(first)
    assert changes.read(first) is None
    assert changes.read(other) == Change(served=served(5, 13))


@pytest.mark.parametrize("content", [b"", b"{", b'{"of": 10}', b"\xff"])
def test_what_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path)
    changes = Changes(home, "shop")
    changes.keep(served(1, 10), Change(served=served(2, 11)))
    home.served("shop", 10).write_bytes(content)
    with pytest.raises(ServingError, match="cannot be read which models"):
        changes.read(served(1, 10))


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "serving").write_text("no folder")
    with pytest.raises(ServingError, match="cannot be written which models"):
        Changes(Home(tmp_path), "shop").keep(served(1, 10), Change(served=served(2, 11)))


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

        def keep(self, version: int, before: int | None = None) -> None:
            declared = ServedModels.parse(self.declared)
            change = Change(
                served=self.models(version), before=None if before is None else self.models(before)
            )
            Changes(self.home, "shop").keep(declared, change)

        def models(self, version: int) -> ServedModels:
            declared = ServedModels.parse(self.declared)
            path = str(packages[version - 1])
            spec = declared.answer.model_copy(update={"version": version, "path": path})
            return declared.model_copy(update={"answer": spec, "epoch": 100 + version})

        @property
        def file(self) -> Path:
            return self.home.served("shop", ServedModels.parse(self.declared).epoch)

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


def test_a_replica_that_starts_with_a_broken_change_serves_what_was_before(changed: Any) -> None:
    async def test() -> None:
        local = changed.replica()
        changed.keep(4, before=2)
        logging.disable(logging.CRITICAL)
        await local.endpoint.reconfigure(changed.declared)
        logging.disable(logging.NOTSET)
        assert local.endpoint.describe()["refused"]["epoch"] == 104
        assert await version(local) == 2
        # One that all have served has nothing before it.
        other = changed.replica()
        changed.keep(4)
        with pytest.raises(MlopsRayError):
            await other.endpoint.reconfigure(changed.declared)

    asyncio.run(test())


def test_a_broken_change_is_tried_once(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        local = changed.replica()
        await local.endpoint.reconfigure(changed.declared)
        loaded = []
        load = local.endpoint.models._loader.load

        def counting(*given: Any) -> Any:
            loaded.append(given)
            return load(*given)

        monkeypatch.setattr(local.endpoint.models._loader, "load", counting)
        changed.keep(4, before=1)
        logging.disable(logging.CRITICAL)
        for _ in range(3):
            await local.endpoint.adopt()
        logging.disable(logging.NOTSET)
        assert len(loaded) == 1

    asyncio.run(test())


def test_a_change_that_comes_while_others_are_loaded_is_adopted_too(
    changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        local = changed.replica()
        loader = local.endpoint.models._loader
        load = loader.load

        later = [3, 1]

        def overtaken(*given: Any) -> Any:
            found = load(*given)
            if later:
                changed.keep(later.pop(0))
            return found

        changed.keep(2, before=1)
        monkeypatch.setattr(loader, "load", overtaken)
        await local.endpoint.reconfigure(changed.declared)
        assert local.endpoint.describe()["epoch"] == 101

    asyncio.run(test())


def test_a_file_that_cannot_be_read_for_a_while_changes_nothing(
    changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "_FOLLOW_EVERY_S", 0.01)

    async def test() -> None:
        local = changed.replica()
        changed.keep(2)
        await local.endpoint.reconfigure(changed.declared)
        await local.endpoint.start()
        changed.keep(3, before=2)
        content = changed.file.read_bytes()
        logging.disable(logging.CRITICAL)
        changed.file.unlink()
        changed.file.mkdir()
        await asyncio.sleep(0.1)
        with pytest.raises(ServingError):
            await local.endpoint.adopt()
        assert await version(local) == 2, "not what was declared once"
        changed.file.rmdir()
        await asyncio.sleep(0.1)
        assert await version(local) == 2
        changed.file.write_bytes(content)
        async with asyncio.timeout(30):
            while await version(local) != 3:
                await asyncio.sleep(0.01)
        logging.disable(logging.NOTSET)
        await local.endpoint.stop()

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
