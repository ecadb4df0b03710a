"""Which ledger a store of artifacts belongs to: what that one does not name is collected."""

from __future__ import annotations

from collections.abc import Sequence

from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.blobs import OWNER
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.retention import Verdict


def claim(artifacts: ArtifactStore, run_id: str) -> None:
    """Mark a store that has no mark yet as that of the ledger that has this run.

    Raises:
        StorageError: The store cannot be read or written.
    """
    with artifacts.writing():
        if artifacts.blobs.owner() is None:
            artifacts.blobs.mark(run_id)


def require_own(ledger: Ledger, artifacts: ArtifactStore, plan: Sequence[Verdict]) -> None:
    """Refuse a ledger that the store does not belong to.

    A store without a mark, of an earlier version, belongs to a ledger that names something of it.

    Args:
        ledger: The one that would decide what is needed.
        artifacts: The store.
        plan: What the ledger says of all that is stored.

    Raises:
        ArtifactError: The store is another ledger's.
    """
    with artifacts.writing():
        owner = artifacts.blobs.owner()
    if owner is not None and ledger.run(owner) is None:
        raise _refused(artifacts, f"it belongs to the ledger that has run {owner}")
    if owner is None and plan and not any(verdict.made_by for verdict in plan):
        raise _refused(artifacts, "the ledger names nothing of what is stored")


def _refused(artifacts: ArtifactStore, why: str) -> ArtifactError:
    return ArtifactError(
        "the store of artifacts is not this ledger's, so nobody knows what is needed",
        where=artifacts.blobs.where,
        why=why,
        fix="set MLOPS_RAY_LEDGER and MLOPS_RAY_ARTIFACTS as the runs had them; if that ledger is "
        f"lost and its models with it, remove the file {OWNER!r} of the store",
    )
