"""Model packages: everything that a model needs to answer, in one folder.

    package.json          architecture, encoder, feature service, threshold, how it was trained
    weights.safetensors   the module's state
    reference.json        how the features were distributed in training

The folder is all that training hands to the registry and to serving. Reading one needs no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.config.features import FeatureService
from mlops_ray.config.training import Model
from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.digest import canonical_json, digest_bytes, digest_json
from mlops_ray.metadata.profile import Reference

MANIFEST = "package.json"
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.json"

Weights = Mapping[str, npt.NDArray[Any]]


class EncoderSpec(Frozen):
    """How feature columns become a model's input.

    ``means`` and ``stds`` belong to ``numeric`` in order; ``indicators`` are the numeric features
    that get a second input which says that the value is missing; ``vocabularies`` belong to
    ``categorical``: a value's code is its place plus one, 0 is unknown.
    """

    numeric: tuple[str, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    indicators: tuple[str, ...]
    clip: float
    categorical: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]

    @property
    def num_numeric(self) -> int:
        """Width of the numeric input, indicators included."""
        return len(self.numeric) + len(self.indicators)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of codes of each categorical input, unknown included."""
        return tuple(len(vocabulary) + 1 for vocabulary in self.vocabularies)

    @property
    def features(self) -> tuple[str, ...]:
        """All feature columns that the model reads, numeric first."""
        return self.numeric + self.categorical


class Manifest(Frozen):
    """The content of ``package.json``.

    ``model`` holds all constructor arguments. ``label`` and ``time`` name the columns of a training
    set that hold the outcome and the prediction time. ``training`` is what a person wants to know
    about the fit; it holds no clock times, so that the same training gives the same digest.
    """

    format_version: Literal[1] = 1
    model: Model
    encoder: EncoderSpec
    service_name: str
    service: FeatureService
    label: str
    time: str
    threshold: float = Field(default=0.5, ge=0, le=1)
    training: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """A package in memory. ``weights`` are the arrays of the module's state by name."""

    path: Path
    manifest: Manifest
    weights: Weights
    reference: Reference
    digest: str
    weights_digest: str


def write(path: Path, manifest: Manifest, weights: Weights, reference: Reference) -> Package:
    """Write a package to the folder ``path``, whole or not at all; replaces one that is there."""
    from safetensors.numpy import save_file

    draft = path.with_name(f".{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    digests = _digests(manifest, weights, reference)
    document = manifest.model_dump(mode="json") | {"digests": digests}
    (draft / MANIFEST).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    (draft / REFERENCE).write_bytes(canonical_json(reference.to_json()) + b"\n")
    save_file({name: np.ascontiguousarray(a) for name, a in weights.items()}, draft / WEIGHTS)
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)
    return read(path)


def read(path: Path | str) -> Package:
    """Read and verify the package in the folder ``path``.

    Raises:
        ArtifactError: a file is missing, unreadable, or does not match its digest.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(path)
    try:
        document = json.loads((folder / MANIFEST).read_text())
        digests = document.pop("digests")
        manifest = Manifest.model_validate(document)
        reference = Reference.from_json(json.loads((folder / REFERENCE).read_text()))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise _broken(folder, f"{error.filename} is not there") from error
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise _broken(folder, f"{type(error).__name__}: {error}") from error
    found = _digests(manifest, weights, reference)
    for part, expected in digests.items():
        if found.get(part) != expected:
            raise _broken(folder, f"the {part} does not match its digest in {MANIFEST}")
    return Package(folder, manifest, weights, reference, digest_json(found), found["weights"])


def digest(path: Path | str) -> str:
    """Return the digest of a package's canonical content: equal models have equal digests."""
    return read(path).digest


def _digests(manifest: Manifest, weights: Weights, reference: Reference) -> dict[str, str]:
    return {
        "manifest": digest_json(manifest.model_dump(mode="json")),
        "weights": _weights_digest(weights),
        "reference": reference.digest,
    }


def _weights_digest(weights: Weights) -> str:
    return digest_json(
        {
            name: [str(a.dtype), list(a.shape), digest_bytes(np.ascontiguousarray(a).tobytes())]
            for name, a in weights.items()
        }
    )


def _broken(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "this folder is no readable model package",
        where=str(folder),
        why=why,
        fix="train or register the model again",
    )
