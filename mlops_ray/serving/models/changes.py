"""Which models took the place of the declared ones, in a file that every replica reads.

Serve takes a replica out of its targets for half a second to give it a new ``user_config``, and sends
requests by a slower way meanwhile. So what a running endpoint changes is kept here, and its
``user_config`` stays as it was. A file belongs to what was declared at one moment on one cluster, so
that a new declaration, or another cluster with the same home, has nothing to do with it.
"""

from __future__ import annotations

from pydantic import ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import Stamp, stamp, write_whole
from mlops_ray.metadata.home import Home
from mlops_ray.serving.models.served import ServedModels


class Change(Frozen):
    """``served`` is to be served; ``before`` is what was, until every replica has shown that it can
    serve the new models."""

    served: ServedModels
    before: ServedModels | None = None

    @property
    def good(self) -> ServedModels:
        """The last models that all replicas have served."""
        return self.before or self.served


class Changes:
    """The changes of one project's endpoint."""

    def __init__(self, home: Home, project: str) -> None:
        self._home = home
        self._project = project

    def read(self, declared: ServedModels) -> Change | None:
        """Return what came after Serve's configuration said ``declared``; None: nothing.

        Raises:
            ServingError: The file cannot be read just now.
        """
        path = self._home.served(self._project, declared.epoch)
        try:
            return Change.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise ServingError(
                "it cannot be read which models are served", where=str(path), why=str(error)
            ) from error

    def keep(self, declared: ServedModels, change: Change) -> None:
        """Have a change take the place of what is declared; on disk when this returns.

        Raises:
            ServingError: It cannot be written.
        """
        path = self._home.served(self._project, declared.epoch)
        try:
            write_whole(path, change.model_dump_json().encode())
        except OSError as error:
            raise ServingError(
                "it cannot be written which models are to be served",
                where=str(path),
                why=str(error),
                fix="check the disk's free space, and who may write to the home",
            ) from error

    def forget(self, declared: ServedModels) -> None:
        """Remove the change of what is declared no more; replicas that drain go on as they are."""
        self._home.served(self._project, declared.epoch).unlink(missing_ok=True)

    def stamp(self, declared: ServedModels) -> Stamp | None:
        """Return another one after each change; None where there was none."""
        return stamp(self._home.served(self._project, declared.epoch))
