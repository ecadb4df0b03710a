"""Start-up of Ray Serve: which ingress, on which port, with TLS and gRPC or without."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.deployment import ingress
from mlops_ray.serving.deployment.placement import roots_of

Mode = Literal["throughput", "default"]

_RECORD = b"ingress"
_NAMESPACE = b"mlops-ray"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingress:
    """How the Serve of a cluster takes requests.

    ``grpc_port`` is 0 where there is no gRPC, ``threads`` are HAProxy's, ``ports`` are what else is
    listened on, by name. ``ours`` says that this package started it; of a Serve that something else
    started, only host, port, mode and gRPC are known.
    """

    host: str
    port: int
    mode: Mode
    tls: bool
    grpc_port: int
    threads: int = 0
    ports: dict[str, int] | None = None
    ours: bool = False


def start(serving: Serving, home: Home | None = None) -> Mode:
    """Make sure that Serve runs on the connected Ray cluster; return the mode that is on.

    Where Serve runs already, its host, port, mode, TLS and gRPC stay as they are: another mode is a
    warning, what else is wanted and not there an error. On several nodes, HAProxy's program lies in
    the home, which they share.

    Raises:
        ServingError: A port is taken by another program, Serve cannot be started, or it runs in a way
            that does not fit.
    """
    found = describe()
    if found is None:
        _check_files(serving)
        ingress.check_port_is_free(serving.host, serving.port)
        if serving.grpc.enabled:
            ingress.check_port_is_free(serving.host, serving.grpc.port, "serving.grpc.port")
        _start(serving, home)
        found = describe()
    if found is None:
        raise ServingError("Ray Serve did not start", where=f"{serving.host}:{serving.port}")
    _check_fits(found, serving)
    return found.mode


def running() -> tuple[int, Mode] | None:
    """Return port and mode of the Serve of this cluster, None where none runs."""
    found = describe()
    return None if found is None else (found.port, found.mode)


def describe() -> Ingress | None:
    """Return how the Serve of this cluster takes requests, None where none runs."""
    import ray

    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    http, grpc, proxies = ray.get(
        [
            controller.get_http_config.remote(),
            controller.get_grpc_config.remote(),
            controller.get_proxies.remote(),
        ]
    )
    classes = {p._ray_actor_creation_function_descriptor.class_name for p in proxies.values()}
    record = _recorded(controller)
    return Ingress(
        host=http.host,
        port=http.port,
        mode="throughput" if "HAProxyManager" in classes else "default",
        tls=bool(http.ssl_certfile) or record.get("tls", False),
        grpc_port=grpc.port if grpc.grpc_servicer_functions else 0,
        threads=record.get("threads", 0),
        ports=record.get("ports"),
        ours=bool(record),
    )


def url(serving: Serving) -> str:
    """Return the base address of the endpoint's HTTP routes."""
    host = "127.0.0.1" if serving.host in ("0.0.0.0", "") else serving.host
    host = "[::1]" if host == "::" else host
    scheme = "http" if serving.security.certificate is None else "https"
    return f"{scheme}://{host}:{serving.port}"


def _start(serving: Serving, home: Home | None) -> None:
    import ray
    from ray import serve

    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    shared = None if nodes == 1 or home is None else home.root / "serve"
    throughput = ingress.environment(serving, shared)
    _check_can_be_private(serving, bool(throughput))
    variables = ingress.common_environment(serving) | throughput | _import_path()
    options: dict[str, Any] = {"host": serving.host, "port": serving.port}
    if not throughput and serving.security.certificate is not None:
        options["ssl_certfile"] = str(serving.security.certificate)
        options["ssl_keyfile"] = str(serving.security.key)
    try:
        serve.start(
            proxy_location="HeadOnly" if nodes == 1 else "EveryNode",
            http_options=options,
            grpc_options=_grpc_options(serving),
            controller_options={"runtime_env": {"env_vars": variables}},
        )
    except (TimeoutError, RuntimeError) as error:
        raise ServingError(
            "Ray Serve cannot be started",
            where=f"{serving.host}:{serving.port}",
            why=str(error).strip().splitlines()[-1] if str(error).strip() else repr(error),
            fix="try serving.mode=default, and look into serve/ among the logs of Ray's session",
        ) from error
    _record(serving, throughput)


def _grpc_options(serving: Serving) -> dict[str, Any] | None:
    if not serving.grpc.enabled:
        return None
    from mlops_ray.serving.grpc.service import SERVICER

    return {
        "port": serving.grpc.port,
        "grpc_servicer_functions": [SERVICER],
        "enable_reflection": False,
    }


def _import_path() -> dict[str, str]:
    """Return what Serve's controller and proxies need to import this package: gRPC's servicer."""
    roots: Sequence[Path] = roots_of([])
    paths = [*map(str, roots), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path))}


def _record(serving: Serving, throughput: dict[str, str]) -> None:
    """Keep what Serve does not tell of itself, for as long as its controller lives."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    record = {
        "controller": controller._actor_id.hex(),
        "tls": serving.security.certificate is not None,
        "threads": ingress.THREADS if throughput else 0,
        "ports": {
            name.removeprefix("RAY_SERVE_").removesuffix("_PORT").lower(): int(value)
            for name, value in throughput.items()
            if name.endswith("_PORT")
        },
    }
    _internal_kv_put(_RECORD, json.dumps(record).encode(), overwrite=True, namespace=_NAMESPACE)


def _recorded(controller: Any) -> dict[str, Any]:
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(_RECORD, namespace=_NAMESPACE)
    record: dict[str, Any] = json.loads(text) if text else {}
    return record if record.get("controller") == controller._actor_id.hex() else {}


def _check_files(serving: Serving) -> None:
    security = serving.security
    for name, path in (("certificate", security.certificate), ("key", security.key)):
        if path is not None and not os.access(path, os.R_OK):
            raise ServingError(
                f"the file {path} cannot be read",
                where=f"serving.security.{name}",
                fix="name a PEM file that exists on each node with an ingress",
            )


def _check_can_be_private(serving: Serving, throughput: bool) -> None:
    if serving.grpc.enabled and serving.security.certificate is not None and not throughput:
        raise ServingError(
            "gRPC cannot speak TLS here",
            where="serving.grpc",
            why="only the throughput mode can; Serve's default ingress would send in clear text",
            fix="set serving.mode=throughput, or serving.grpc.enabled=false",
        )


def _check_fits(found: Ingress, serving: Serving) -> None:
    origin = "" if found.ours else ", and was started by something else"
    restart = "end Serve first (`serve shutdown`), or use another cluster"
    if found.port != serving.port:
        raise ServingError(
            f"Ray Serve runs on port {found.port} of this cluster, not on {serving.port}{origin}",
            where="serving.port",
            why="a cluster has one Serve, whose port is fixed when it starts",
            fix=f"set serving.port={found.port}, or {restart}",
        )
    wanted = serving.security.certificate is not None
    if found.tls != wanted:
        raise ServingError(
            f"Ray Serve runs {'with' if found.tls else 'without'} TLS on this cluster{origin}",
            where="serving.security.certificate",
            why="TLS is fixed when Serve starts",
            fix=("name the certificate and key, or " if found.tls else "") + restart,
        )
    if serving.grpc.enabled and found.grpc_port != serving.grpc.port:
        state = f"on port {found.grpc_port}" if found.grpc_port else "without gRPC"
        raise ServingError(
            f"Ray Serve runs {state} on this cluster{origin}",
            where="serving.grpc",
            why="gRPC is fixed when Serve starts",
            fix=restart,
        )
    if found.mode != serving.mode:
        logger.warning(
            "Ray Serve runs in %s mode%s; configured is %s, which acts when Serve first starts: %s",
            found.mode,
            origin,
            serving.mode,
            restart,
        )
