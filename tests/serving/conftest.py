"""Fixtures: packages of the shop, its home, and its endpoint here or on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import shop
from serving.harness import LocalShop, Served, open_local, shared_serving

from mlops_ray.config.serving import Serving
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint as Address


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sound packages, one with broken weights, one that needs a feature nobody has."""
    folder = tmp_path_factory.mktemp("packages")
    sound = [shop.write_package(folder / f"m{seed}", seed) for seed in (1, 2, 3)]
    broken = shop.write_package(folder / "broken", 4)
    (broken / "weights.safetensors").write_bytes(b"not weights")
    strange = shop.write_package(folder / "strange", 5, extra=("moon_phase",))
    return [*sound, broken, strange]


@pytest.fixture(scope="session")
def shop_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose online store has features of the shop."""
    home = Home(tmp_path_factory.mktemp("shop") / "home")
    shop.fill_store(home, "shop")
    return home


@pytest.fixture
def local(shop_home: Home, packages: list[Path], tmp_path: Path) -> LocalShop:
    """An endpoint in this process, with no model yet and an empty log."""
    return open_local(shop_home, packages, Home(tmp_path / "log"), Serving(max_body_bytes=200_000))


@pytest.fixture(scope="module")
def served(ray_cluster: Any, shop_home: Home, packages: list[Path]) -> Iterator[Served]:
    """The shop served in throughput mode; taken down at the end of the module."""
    from mlops_ray.serving.deployment.deploy import remove

    serving = shared_serving(max_body_bytes=200_000)
    served = Served(shop_home, serving, packages, Address(name="shop", url="", versions={}))
    served.address = served.deploy(1, 1)
    yield served
    remove("shop")
