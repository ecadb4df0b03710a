"""Which code of the project makes a view's rows."""

from __future__ import annotations

from mlops_ray.config.features import Features
from mlops_ray.features.definitions import source_of
from mlops_ray.orchestration.keys import code_digest


def code_digest_of(features: Features, view: str) -> str:
    """Return the digest of the functions that make a view's rows, "" where there are none.

    These are the read and clean functions of the source that it is made from in the end, over other
    views if need be, with all that they import of the project's own packages. It is the
    **generation** of the rows: rows of two generations never lie side by side in a store.
    """
    source = source_of(features, view)
    targets = [target for target in (source.read, source.clean) if target is not None]
    if not targets:
        return ""
    packages = {target.partition(".")[0] for target in targets}
    return code_digest(targets[0], targets, sorted(packages))
