"""The applications of a cluster's Ray Serve, through its declarative API.

There a changed ``user_config`` reaches the running replicas, while ``serve.run`` would restart them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlops_ray.errors import ServingError
from mlops_ray.serving.deployment.traces import root_cause

READY_TIMEOUT_S = 180.0
TURN_TIMEOUT_S = 600.0
POLL_S = 0.1

_TURN = "mlops-ray-deploy"
_NAMESPACE = "mlops-ray"

Config = dict[str, Any]


@contextmanager
def alone(timeout_s: float = TURN_TIMEOUT_S) -> Iterator[None]:
    """Wait until no other process deploys on this cluster; Serve takes its list as a whole.

    The turn is an actor's name, which only one can have. The actor dies with the process that made
    it, so a turn that was cut off ends by itself.

    Raises:
        ServingError: Another process has had the turn for ``timeout_s``.
    """
    import ray

    turn = _take_turn(timeout_s)
    try:
        yield
    finally:
        ray.kill(turn)


def details() -> Config:
    """Return what Serve says of itself and its applications."""
    found: Config = _request(lambda client: client.get_serve_details())
    return found


def deployed(current: Config, name: str) -> Config | None:
    """Return the configuration of an application as it was deployed, None where there is none."""
    config: Config | None = current["applications"].get(name, {}).get("deployed_app_config")
    return config


def put(current: Config, name: str, application: Config | None) -> None:
    """Send the list of all applications, with this one replaced or (None) left out."""
    others = [
        config
        for other, state in current["applications"].items()
        if other != name and (config := state.get("deployed_app_config")) is not None
    ]
    document = {
        "proxy_location": current["proxy_location"],
        "http_options": current["http_options"],
        "grpc_options": current["grpc_options"],
        "applications": others + ([] if application is None else [application]),
    }
    _request(lambda client: client.deploy_applications(document))


def wait_until_running(name: str, what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Return when an application runs as it was put.

    Raises:
        ServingError: It failed, or time is up.
    """
    deadline_s = time.monotonic() + timeout_s
    state: Config = {}
    while time.monotonic() < deadline_s:
        state = details()["applications"].get(name, {})
        if state.get("status") == "DEPLOY_FAILED":
            raise failed(what, state)
        if state.get("status") == "RUNNING":
            return
        time.sleep(POLL_S)
    raise not_ready(what, state, timeout_s)


def not_ready(what: str, state: Config, timeout_s: float) -> ServingError:
    """Make the error for an application whose replicas do not start in time."""
    return ServingError(
        f"{what} is not ready after {timeout_s:g} s",
        where=f"status {state.get('status', 'missing')}",
        why=state.get("message", "") or "its replicas have not started: too few free CPUs?",
        fix="compare serving.num_cpus with `ray status`, and look into serve/ among Ray's logs",
    )


def failed(what: str, state: Config) -> ServingError:
    """Make the error for an application that cannot be deployed; ``what`` is what it is."""
    messages = [state.get("message", "")]
    messages += [item.get("message", "") for item in state.get("deployments", {}).values()]
    text = next((text for text in reversed(messages) if text), "")
    return ServingError(
        f"{what} cannot be deployed",
        why=root_cause(text),
        fix="see serve/ among the logs of Ray's session for more",
    )


class _Turn:
    """What holds the name."""


def _take_turn(timeout_s: float) -> Any:
    import ray

    made: Any = ray.remote(_Turn)
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return made.options(name=_TURN, namespace=_NAMESPACE, num_cpus=0).remote()
        except ValueError as error:
            if time.monotonic() > deadline_s:
                raise ServingError(
                    "another process is deploying on this cluster, and does not come to an end",
                    why=f"it has had its turn for {timeout_s:g} s",
                    fix="end it, or wait",
                ) from error
        time.sleep(POLL_S)


def _request(call: Callable[[Any], Any]) -> Any:
    from ray._private.worker import get_dashboard_url
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    address = f"http://{get_dashboard_url()}"
    try:
        return call(ServeSubmissionClient(address))
    except (RuntimeError, ConnectionError) as error:
        raise ServingError(
            "Ray Serve's REST API does not accept the request",
            where=address,
            why=str(error).strip()[:500],
            fix="the dashboard must run, and RAY_AUTH_MODE=token be set as in the cluster",
        ) from error
