"""Which models took the place of the declared ones, in a file that every replica reads.

Serve takes a replica out of its targets for half a second to give it a new ``user_config``, and sends
requests by a slower way meanwhile. So what a running endpoint changes is kept here, and its
``user_config`` stays as it was.
"""

from __future__ import annotations

import logging

from pydantic import ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.metadata.files import Stamp, stamp, write_whole
from mlops_ray.metadata.home import Home
from mlops_ray.serving.models.served import ServedModels

logger = logging.getLogger("ray.serve")


class _Change(Frozen):
    """``served`` took the place of what was declared with the epoch ``of``, and of nothing else."""

    of: int
    served: ServedModels


class Changes:
    """The file of one project's endpoint."""

    def __init__(self, home: Home, project: str) -> None:
        self._path = home.served(project)

    def latest(self, declared: ServedModels) -> ServedModels:
        """Return what is to be served where Serve's configuration says ``declared``."""
        try:
            change = _Change.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return declared
        except (OSError, ValidationError):
            logger.exception("%s cannot be read; the declared models are served", self._path)
            return declared
        return change.served if change.of == declared.epoch else declared

    def keep(self, declared: ServedModels, served: ServedModels) -> None:
        """Have ``served`` take the place of what is declared; on disk when this returns."""
        change = _Change(of=declared.epoch, served=served)
        write_whole(self._path, change.model_dump_json().encode())

    @property
    def stamp(self) -> Stamp | None:
        """Another one after each change; None where there was none."""
        return stamp(self._path)
