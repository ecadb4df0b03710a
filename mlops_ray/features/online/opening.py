"""Which online store a project has."""

from __future__ import annotations

from pathlib import Path

from mlops_ray.config.features import Features
from mlops_ray.features.online.protocol import OnlineStore


def open_online(
    features: Features, folder: Path, project: str, readonly: bool = False
) -> OnlineStore:
    """Open a project's online store: the one that ``features.online.store`` names.

    Args:
        features: The declarations.
        folder: Where an embedded store lies.
        project: What the project's keys in a shared store begin with.
        readonly: Open for reading only, as serving does.

    Raises:
        FeatureStoreError: The embedded store is not there yet, or cannot be opened. A server is first
            asked when it is read or written.
    """
    if features.online.store == "redis":
        from mlops_ray.features.online.redis import RedisStore

        return RedisStore(features, project, readonly=readonly)
    from mlops_ray.features.online.lmdb import LmdbStore

    return LmdbStore(folder, features, readonly=readonly)
