"""Ray Serve for the serving benchmark: our endpoint beside a bare handler, or Serve as it comes.

Started with a mode, a port and the folder of the world. In mode ``throughput`` our start-up makes the
cluster and deploys both; in ``default`` Ray and Serve start by themselves, with the bare handler alone.
Each line of stdin is a request: ["serve"] deploys, and answers a token for our endpoint and the port
of its replica; ["swap", version] makes a version the champion; ["restart"] changes a setting, so that
a new replica takes the place of the old one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from benchmarks._peers import ROOT
from benchmarks._serving_world import PROJECT, SERVICE, World, declare
from mlops_ray.config.serving import Serving

BARE = "bare"
MAX_ONGOING = 128


class Throughput:
    """Our endpoint, and the bare handler on the same cluster in the same mode."""

    def __init__(self, port: int, world: World) -> None:
        self._world = world
        self._tokens = world.folder / "tokens.json"
        self._options: dict[str, Any] = {
            "port": port,
            "max_ongoing_requests": MAX_ONGOING,
            "routing": {"shares": {"challenger": 0.1}, "sticky_by": ["customer"]},
            "security": {"tokens": str(self._tokens)},
        }

    def serve(self) -> tuple[str, int]:
        """Deploy ours first, which takes the whole port; return a token and its replica's port."""
        from mlops_ray.cluster.connect import connect
        from mlops_ray.config.project import Cluster
        from mlops_ray.serving.deployment import applications
        from mlops_ray.serving.endpoint import tokens

        connect(Cluster(address="local", dashboard_port=_free_port()), roots=[ROOT])
        token = tokens.add(self._tokens, "benchmark")
        self.swap(1)
        bare = {
            "name": BARE,
            "route_prefix": f"/{BARE}",
            "import_path": "benchmarks._serving_bare:build",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
            "args": _arguments(self._world),
        }
        applications.put(applications.details(), BARE, bare)
        applications.wait_until_running(BARE, "the bare handler")
        return token, _replica_port()

    def swap(self, champion: int) -> None:
        """Make a version the champion, in the replica that runs."""
        from mlops_ray.serving.deployment.deploy import deploy

        serving = Serving.model_validate(self._options)
        models = self._world.models(champion)
        deploy(PROJECT, self._world.home, serving, declare(), SERVICE, models)

    def restart(self) -> None:
        """Replace the replica."""
        self._options["max_rows"] = 1000
        self.swap(1)


class Default:
    """The bare handler, in the mode that Serve takes where nobody says anything."""

    def __init__(self, port: int, world: World) -> None:
        self._port, self._world = port, world

    def serve(self) -> None:
        """Deploy it."""
        import ray
        from ray import serve

        from benchmarks import _serving_bare

        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        # A second dashboard on one machine would look for its ports among those of the first.
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, runtime_env=environment,
            log_to_driver=False,
        )  # fmt: skip
        serve.start(http_options={"port": self._port})
        application = _serving_bare.build(_arguments(self._world))
        serve.run(application, name=BARE, route_prefix=f"/{BARE}")


def _replica_port() -> int:
    import ray

    # Serve tells others of HAProxy alone; this is how HAProxy itself learns of replicas.
    controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    groups = ray.get(controller.get_target_groups.remote(PROJECT, from_proxy_manager=True))
    return next(target.port for group in groups for target in group.targets)


def _arguments(world: World) -> dict[str, Any]:
    return {"script": str(world.script(1)), "max_ongoing_requests": MAX_ONGOING}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main() -> None:
    mode, port, folder = sys.argv[1:]
    kind = Throughput if mode == "throughput" else Default
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    deployed = kind(int(port), World(Path(folder)))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print("answer", json.dumps(getattr(deployed, name)(*arguments)), flush=True)

    import ray

    # Serve's own shutdown would drain what nobody uses any more.
    ray.shutdown()


if __name__ == "__main__":
    main()
