"""What triggers look at outside of the ledger: feature tables and the project's repository."""

from __future__ import annotations

import subprocess
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError, MlopsRayError

if TYPE_CHECKING:
    from mlops_ray.features.offline import OfflineStore

_PATIENCE_S = 30


class World(Protocol):
    """What can be seen of the world."""

    def version(self, view: str, seen: str) -> str:
        """Return ``<table id>:<version>`` of the newest version of a view that has other rows than
        the version ``seen``; ``seen`` itself where there is none. "" is before any version."""

    def head(self, branch: str) -> str:
        """Return the commit that a branch of the project's repository is at."""


class ProjectWorld:
    """The feature tables of one project, and the repository that its folder lies in."""

    def __init__(self, features: Features, offline: Path, directory: Path) -> None:
        self._features = features
        self._offline = offline
        self._directory = directory

    def version(self, view: str, seen: str) -> str:
        """See ``World``. Compaction and other commits that leave the rows as they are do not count.

        Raises:
            FeatureStoreError: The table cannot be read.
        """
        from mlops_ray.features import delta_log

        version, table = self._store.version(view), self._store.table_id(view)
        if version < 0:
            return ""
        known_table, _, known = seen.rpartition(":")
        if known_table != table:
            return f"{table}:{version}"
        if int(known) == version:
            return seen
        try:
            brought = bool(delta_log.changed_files(self._store.path(view), int(known), version))
        except FeatureStoreError:
            brought = True  # rows were taken away or replaced
        return f"{table}:{version}" if brought else seen

    def head(self, branch: str) -> str:
        """See ``World``. ``origin/main`` is what was fetched last.

        Raises:
            MlopsRayError: There is no repository or no such branch.
        """
        command = ["git", "rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}"]
        try:
            done = subprocess.run(
                command, cwd=self._directory, capture_output=True, timeout=_PATIENCE_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise MlopsRayError(
                f"the head of branch {branch!r} is unknown",
                where=str(self._directory),
                why=str(error),
                fix="check that the folder is in a git repository which has this branch",
            ) from error
        return done.stdout.decode().strip()

    @cached_property
    def _store(self) -> OfflineStore:
        from mlops_ray.features.offline import OfflineStore

        return OfflineStore(self._offline, self._features)
