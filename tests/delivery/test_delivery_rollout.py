"""Rolling out registered versions to the endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving import shop
from serving.harness import shared_serving

from mlops_ray.config.serving import Serving
from mlops_ray.delivery.steps import deploy
from mlops_ray.errors import RegistryError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Report
from mlops_ray.orchestration.context import Context, Silent
from mlops_ray.registry.registry import Registry
from mlops_ray.serving.client.http import Client
from mlops_ray.serving.deployment.deploy import remove

PROJECT = "shop_rollout"
REPORT = Report(rows=10, positives=5, auc=0.7, log_loss=0.6, calibration_error=0.1)


@dataclass
class Recorder(Silent):
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    links: list[tuple[str, str, str]] = field(default_factory=list)

    def event(self, kind: str, **data: Any) -> None:
        self.events.append((kind, data))

    def reads(self, kind: str, name: str) -> None:
        self.links.append(("reads", kind, name))

    def writes(self, kind: str, name: str) -> None:
        self.links.append(("writes", kind, name))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with two registered versions, of which the first is champion."""
    folder = tmp_path_factory.mktemp("rollout")
    home = Home(folder / "home")
    shop.fill_store(home, PROJECT)
    registry = Registry(home)
    for seed in (1, 2):
        package = shop.write_package(folder / f"m{seed}", seed)
        registry.register(PROJECT, package, REPORT, {}, "champion" if seed == 1 else None)
    return home


@pytest.fixture(scope="module")
def serving(ray_cluster: Any) -> Iterator[Serving]:
    yield shared_serving()
    remove(PROJECT)


def test_aliases_are_served_and_missing_ones_recorded(
    registered: Home, serving: Serving, tmp_path: Path
) -> None:
    recorder = Recorder()
    context = Context(PROJECT, registered, reporter=recorder)
    endpoint = deploy(context, PROJECT, serving, shop.features(), ["champion", "first"])
    assert endpoint.versions == {"champion": 1}
    assert [kind for kind, _ in recorder.events] == ["alias_not_set", "deployment"]
    assert recorder.links == [
        ("reads", "model", f"{PROJECT}@1"),
        ("writes", "deployment", PROJECT),
    ]
    client = Client(endpoint)
    assert client.predict([shop.ROW]).version == 1

    registry = Registry(registered)
    registry.set_alias(PROJECT, "first", 1)
    registry.set_alias(PROJECT, "champion", 2)
    endpoint = deploy(context, PROJECT, serving, shop.features(), ["champion", "first"])
    assert endpoint.versions == {"champion": 2, "first": 1}
    assert client.metadata()["versions"] == {"champion": 2, "first": 1}
    assert client.predict([shop.ROW]).version == 2


def test_nothing_to_deploy(registered: Home) -> None:
    context = Context(PROJECT, registered)
    with pytest.raises(RegistryError, match="no candidate"):
        deploy(context, PROJECT, Serving(), shop.features(), ["candidate", "champion"])


def test_service_that_is_not_declared(registered: Home) -> None:
    document = shop.features().model_dump(mode="json", by_alias=True)
    document["services"] = {"other": document["services"]["buys"]}
    features = type(shop.features()).model_validate(document)
    with pytest.raises(ServingError, match="feature service buys"):
        deploy(Context(PROJECT, registered), PROJECT, Serving(), features, ["champion"])


def test_an_application_is_built_from_a_projects_folder(
    registered: Home, tiny_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.delivery import application

    changes = {"name": PROJECT, "home": registered.root, "features": shop.features()}
    project = tiny_project.model_copy(update=changes)
    monkeypatch.setattr(application, "load_project", lambda *_: project)
    built = application.build({"directory": str(tmp_path), "aliases": ["champion"]})
    deployment = built._bound_deployment
    assert deployment.user_config["answer"]["alias"] == "champion"
    assert deployment.init_args[0]["service"] == "buys"
    with pytest.raises(RegistryError, match="has no nobody"):
        application.build({"directory": str(tmp_path), "aliases": ["nobody"]})
