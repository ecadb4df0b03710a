"""What was applied: the definition of each view whose tables are in the store, kept beside them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.definitions import content_of, define, without_secrets
from mlops_ray.metadata.digest import canonical_json
from mlops_ray.metadata.files import write_whole

APPLIED = "applied.json"


class AppliedView(Frozen):
    """A view as it was last applied.

    ``content`` is what its digest covers, ``code`` the digest of the project code that makes its
    rows. ``declared`` holds the whole declarations of view, entity and source, secrets masked.
    """

    view: str
    digest: str
    code: str
    content: dict[str, Any]
    declared: dict[str, Any]
    at: Instant


def describe(features: Features, view: str) -> AppliedView:
    """Return the record of a view as it is declared now."""
    definition = define(features, view)
    declared = {
        "view": definition.view.model_dump(mode="json"),
        "entity": features.entities[definition.view.entity].model_dump(mode="json"),
    }
    if definition.view.source is not None:
        source = features.sources[definition.view.source].model_dump(mode="json")
        declared["source"] = without_secrets(source)
    return AppliedView(
        view=view,
        digest=definition.digest,
        code=code_digest_of(features, view),
        content=content_of(features, view),
        declared=declared,
        at=datetime.now(UTC),
    )


def read_applied(root: Path) -> dict[str, AppliedView]:
    """Return the record of every view below the offline store's folder ``root``, by name.

    Raises:
        FeatureStoreError: A record cannot be read.
    """
    found = {}
    for file in sorted(root.glob(f"*/{APPLIED}")):
        try:
            record = AppliedView.model_validate_json(file.read_bytes())
        except (ValidationError, OSError) as error:
            raise FeatureStoreError(
                "the record of an applied view cannot be read",
                where=str(file),
                why=str(error).splitlines()[0],
                fix="remove the file; the next materialisation writes it anew",
            ) from error
        found[record.view] = record
    return found


def write_applied(root: Path, record: AppliedView) -> None:
    """Keep a record beside its view's tables: whole or not at all."""
    write_whole(root / record.view / APPLIED, canonical_json(record) + b"\n")
