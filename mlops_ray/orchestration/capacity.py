"""Whether the nodes of a cluster can hold what a step asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlops_ray.config.workflow import Resources


def nodes_now() -> list[dict[str, float]]:
    """Return what each living node of the cluster has in all."""
    import ray

    return [dict(node.get("Resources", {})) for node in ray.nodes() if node["Alive"]]


def shortage(
    asked: Resources, nodes: Callable[[], Iterable[Mapping[str, float]]] = nodes_now
) -> str | None:
    """Say what a step asks for, where no node has all of it even when idle; else None.

    Args:
        asked: What the step declares. Its labels are not looked at.
        nodes: Says what each node has in all, by Ray's names of resources.
    """
    wanted: dict[str, float] = {
        "CPU": asked.num_cpus,
        "GPU": asked.num_gpus,
        "memory": asked.memory_bytes or 0,
        **asked.custom,
    }
    wanted = {name: amount for name, amount in wanted.items() if amount}
    if not wanted:
        return None
    for node in nodes():
        if all(node.get(name, 0) >= amount for name, amount in wanted.items()):
            return None
    text = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    return f"no node of the cluster has {text}"


def may_grow() -> bool:
    """Whether an autoscaler may bring more nodes: not to a Ray that this process has started."""
    from ray._private import worker

    node: Any = worker._global_node
    return node is None or not node.is_head()
