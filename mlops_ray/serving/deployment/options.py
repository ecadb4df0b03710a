"""From the declared serving to the options of Ray Serve's deployments, as its declarative API has them.

Serve changes most of these in running replicas; what it does not is in the application's arguments.
"""

from __future__ import annotations

import math
from typing import Any

from mlops_ray.config.serving import Autoscaling, Placement, Serving

Options = dict[str, Any]

LATENCY_POLICY = "mlops_ray.serving.deployment.scaling:ByLatency"

_HEADROOM = 32
_MODEL_CALLS = 1000
_HEALTH_CHECK_TIMEOUT_S = 30.0
_DRAIN_POLL_S = 0.5

# Serve averages what replicas report over this time; it wants more than its ten seconds.
_LEAST_WINDOW_S = 12.0


def endpoint_options(serving: Serving) -> Options:
    """Return the options of the endpoint's own deployment, as a JSON value.

    The endpoint itself refuses what is too much, with an error of its own form. Serve's limits are a
    second wall behind that one, with room for questions about health.
    """
    accepted = serving.max_ongoing_requests + serving.max_queued_requests
    return {
        **_common(serving),
        **_replicas(serving.autoscaling),
        "max_ongoing_requests": accepted + _HEADROOM,
        "max_queued_requests": serving.max_queued_requests + _HEADROOM,
        "backpressure_config": {
            "status_code": 503,
            "retry_after_s": serving.retry_after.total_seconds(),
        },
        "ray_actor_options": {"num_cpus": serving.num_cpus, "num_gpus": serving.num_gpus},
    }


def model_options(serving: Serving, placement: Placement) -> Options:
    """Return the options of the deployment of one alias that has processes of its own."""
    resources = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus}
    return {
        **_common(serving),
        "num_replicas": placement.replicas,
        # The endpoints that ask have limits of their own.
        "max_ongoing_requests": _MODEL_CALLS,
        "ray_actor_options": resources,
    }


def without_options(serving: Serving) -> Serving:
    """Return what replicas are made from: without that which changes while they run.

    Shares travel with the models, the rest in the options or in how Serve was started.
    """
    plain = Serving()
    changes = {
        name: getattr(plain, name)
        for name in ("host", "port", "mode", "drain", "health_check_every", "autoscaling", "grpc")
    }
    routing = serving.routing.model_copy(update={"shares": {}})
    security = serving.security.model_copy(update={"certificate": None, "key": None})
    return serving.model_copy(update={**changes, "routing": routing, "security": security})


def _common(serving: Serving) -> Options:
    return {
        # With new code, the new replica is up before the old one goes.
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": serving.drain.total_seconds(),
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
        "health_check_period_s": serving.health_check_every.total_seconds(),
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
        # Serve would make a record of each request before it drops it.
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }


def _replicas(scaling: Autoscaling) -> Options:
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.max_replicas}
    upscale_delay_s = scaling.upscale_delay.total_seconds()
    config: Options = {
        "min_replicas": scaling.min_replicas,
        # What scales to none starts with one, so that a model that cannot be served is seen.
        "initial_replicas": max(1, scaling.min_replicas),
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay.total_seconds(),
        "look_back_period_s": max(_LEAST_WINDOW_S, upscale_delay_s),
    }
    if scaling.policy is not None:
        module, _, name = scaling.policy.rpartition(".")
        config["policy"] = {"policy_function": f"{module}:{name}"}
    if scaling.target_latency is not None:
        target_ms = math.ceil(scaling.target_latency.total_seconds() * 1000)
        config["policy"] = {
            "policy_function": LATENCY_POLICY,
            "policy_kwargs": {"target_ms": target_ms},
        }
    return {"autoscaling_config": config}
