"""Two nodes, each with a copy of the online store on a disk of its own.

``python -m features.online_nodes FOLDER``, in the folder ``tests``, beside no other Ray: tasks on each
node read from their copies. The nodes are processes of one machine, so the copies' folder holds
the node's id in the place of a disk.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from features.online_samples import declare, keys, row, table

from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.config.features import Features
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online.nodes import open_near
from mlops_ray.metadata.home import Home

PROJECT = "nodes"


def commit(offline: OfflineStore, features: Features, moment: int, price: float) -> None:
    rows = table(features, "thing", [row(moment, price=price)])
    offline.append("thing", rows, moment)


def read(folder: Path) -> tuple[str, float]:
    """On the node of this task: its id, and the price in its copy."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    features = declared(folder / node)
    store = open_near(features, Home(folder / "home"), PROJECT)
    matrix, _ = store.read_matrix("thing", keys(("north", 1)), np.array([10**6]))
    return node, float(matrix[0, 0])


def declared(disk: Path) -> Features:
    return declare(copies=str(disk), copy_every="0.2s")


def main(folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"a": 1}})
    cluster.add_node(num_cpus=1, resources={"b": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    offline = OfflineStore(Home(folder / "home").offline(PROJECT), declared(folder))
    remote: Any = ray.remote(read)
    try:
        commit(offline, declared(folder), 1, 1.0)
        places = [remote.options(resources={name: 1}) for name in ("a", "b")]
        first = ray.get([place.remote(folder) for place in places])
        commit(offline, declared(folder), 2, 2.0)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            later = ray.get([place.remote(folder) for place in places])
            if [price for _, price in later] == [2.0, 2.0]:
                break
        assert len({node for node, _ in first}) == 2
        assert [price for _, price in first] == [1.0, 1.0]
        assert [price for _, price in later] == [2.0, 2.0]
        actors = ray.util.list_named_actors(all_namespaces=True)
        assert len(actors) == 2, actors
        print("two nodes, two copies")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    prepare_environment()
    main(Path(sys.argv[1]))
