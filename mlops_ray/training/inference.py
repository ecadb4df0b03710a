"""Answering with a model package: the one code that serving and evaluation score with."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlops_ray.errors import TrainingError
from mlops_ray.metadata.package import Package
from mlops_ray.training.encoder import Columns, Encoder
from mlops_ray.training.loop import build

_BLOCK_ROWS = 16_384
_PROBE_ROWS = (1, 2, 5, 64)
_TOLERANCE = 1e-6


class Predictor:
    """Scores feature columns with a package's model; ready and warm once made.

    It runs the frozen TorchScript form of the model where that gives the same scores as the module
    itself (checked here, to 1e-6) and the module itself otherwise. Sets torch to one thread: the
    models are small, and replicas share the machine.

    Raises:
        TrainingError: The weights do not fit the architecture.
    """

    def __init__(self, package: Package) -> None:
        torch.set_num_threads(1)
        self.package = package
        self._encoder = Encoder(package.manifest.encoder)
        module = _load(package)
        compiled = _compile(module)
        probes = [_probe(package, rows) for rows in _PROBE_ROWS]
        self.compiled = compiled is not None and all(_equal(module, compiled, p) for p in probes)
        self._module: Any = compiled if self.compiled else module
        for _ in range(3):
            for probe in probes:
                _score(self._module, *probe)

    def predict(self, columns: Columns) -> npt.NDArray[np.float64]:
        """Return the probability of label 1, float64 [n]; ``columns`` holds each feature, [n].

        Raises:
            TrainingError: A feature column is missing.
        """
        numeric, codes = self._encoder.encode(columns)
        scores = np.empty(len(numeric))
        for start in range(0, len(scores), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            scores[block] = _score(self._module, numeric[block], codes[block])
        return scores


def _score(
    module: Any, numeric: npt.NDArray[np.float32], codes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    with torch.inference_mode():
        logits = module(torch.from_numpy(numeric), torch.from_numpy(codes))
        scores: npt.NDArray[np.float64] = torch.sigmoid(logits.double()).numpy()
    return scores


def _load(package: Package) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        module = build(package.manifest.model)
    try:
        module.load_state_dict(
            {name: torch.from_numpy(np.array(array)) for name, array in package.weights.items()}
        )
    except RuntimeError as error:
        raise TrainingError(
            f"the weights do not fit {package.manifest.model.target}",
            where=str(package.path),
            why=str(error),
            fix="the class has changed since the training: train again, or take its code of then",
        ) from error
    return module.eval()


def _compile(module: nn.Module) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(torch.jit.script(module))
    # TorchScript refuses what it does not know with errors of many classes; eager always works.
    except Exception:
        return None


def _equal(module: nn.Module, compiled: Any, probe: Any) -> bool:
    try:
        found = _score(compiled, *probe)
    except RuntimeError:
        return False
    return bool(np.allclose(_score(module, *probe), found, rtol=0, atol=_TOLERANCE))


def _probe(package: Package, rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    spec = package.manifest.encoder
    random = np.random.default_rng(rows)
    numeric = random.standard_normal((rows, spec.num_numeric)).astype(np.float32)
    codes = [random.integers(0, cardinality, rows) for cardinality in spec.cardinalities]
    return numeric, np.stack(codes, axis=1) if codes else np.empty((rows, 0), dtype=np.int64)
