"""What is deployed on a cluster: its endpoints, as a list for people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlops_ray.metadata.home import Home
from mlops_ray.serving.deployment.app import DEPLOYMENT, IMPORT_PATH
from mlops_ray.serving.deployment.applications import Config, details
from mlops_ray.serving.deployment.runtime import Ingress, describe
from mlops_ray.serving.models.changes import Changes
from mlops_ray.serving.models.served import ServedModels


@dataclass(frozen=True)
class Listed:
    """An endpoint as it is deployed.

    ``status`` is Ray Serve's: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY, DELETING. ``versions`` and
    ``shares`` go by alias, the answering one first; an alias in shadow has a share of 0. ``replicas``
    are those that run, by deployment.
    """

    name: str
    status: str
    message: str
    url: str
    versions: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)


def endpoints() -> list[Listed]:
    """Return the endpoints of the connected cluster by name; none where Serve does not run.

    Raises:
        ServingError: Serve's REST API cannot be asked.
    """
    ingress = describe()
    if ingress is None:
        return []
    applications: dict[str, Config] = details()["applications"]
    return [
        _listed(name, state, ingress)
        for name, state in sorted(applications.items())
        if _config(state).get("import_path") == IMPORT_PATH
    ]


def _listed(name: str, state: Config, ingress: Ingress) -> Listed:
    served = _served(name, _config(state))
    return Listed(
        name=name,
        status=state["status"],
        message=state.get("message", ""),
        url=f"{base_url(ingress)}/v1/models/{name}",
        versions={} if served is None else {model.alias: model.version for model in served.all},
        shares={} if served is None else _shares(served),
        replicas={
            deployment: sum(r.get("state") == "RUNNING" for r in found.get("replicas", []))
            for deployment, found in state.get("deployments", {}).items()
        },
    )


def base_url(ingress: Ingress) -> str:
    """Return the address at which a cluster's Serve takes HTTP, as seen from its head node."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(ingress.host, ingress.host)
    return f"{'https' if ingress.tls else 'http'}://{host}:{ingress.port}"


def _config(state: Config) -> dict[str, Any]:
    return state.get("deployed_app_config") or {}


def _served(name: str, config: Config) -> ServedModels | None:
    home = Home(Path(config["args"]["home"]))
    for deployment in config.get("deployments", []):
        # Without the home it cannot be known what has taken the place of the declared models.
        if (
            deployment["name"] == DEPLOYMENT
            and deployment.get("user_config")
            and home.root.is_dir()
        ):
            declared = ServedModels.parse(deployment["user_config"])
            change = Changes(home, name).read(declared)
            return change.good if change else declared
    return None


def _shares(served: ServedModels) -> dict[str, float]:
    given = {challenger.spec.alias: challenger.share for challenger in served.challengers}
    rest = {served.answer.alias: round(1 - sum(given.values()), 9)}
    return rest | given | {shadow.alias: 0.0 for shadow in served.shadows}
