"""Answering with a model package: the one code that serving and evaluation score with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlops_ray.errors import TrainingError
from mlops_ray.features.matrix import take
from mlops_ray.metadata.package import EncoderSpec, Package
from mlops_ray.training import forms
from mlops_ray.training.allocator import keep_freed_memory
from mlops_ray.training.encoder import Columns, Encoder, Scaling
from mlops_ray.training.loop import build

_BLOCK_ROWS = 4096
_PROBE_ROWS = (1, 2, 5, 64, 1024)
_WARMING_CALLS = 3


class Predictor:
    """Scores feature columns with a package's model; ready and warm once made.

    The model runs in a form that gives the module's own scores, to 1e-6, checked here on rows with
    missing and extreme numbers and unknown categories: by default as frozen TorchScript, or as it
    is where that is not possible, which are the same for the same package everywhere. ``fastest``
    tries ONNX Runtime too and takes what is fastest on this machine. ``form`` says what runs.

    Sets torch to one thread: the models are small, and replicas share the machine. The process keeps
    freed memory (see ``keep_freed_memory``).

    Args:
        package: The model. Its weights are not kept.
        fastest: Take the fastest form, for serving.
        gpu: Run on the GPU, where there is one.

    Raises:
        TrainingError: The weights do not fit the architecture.
    """

    def __init__(self, package: Package, *, fastest: bool = False, gpu: bool = False) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        spec = package.manifest.encoder
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        self._encoder = Encoder(spec)
        probes = [self._encoder.raw(_probe(spec, rows)) for rows in _PROBE_ROWS]
        choose = forms.fastest if fastest else forms.frozen
        # A module of its own: it may go to the GPU.
        whole = _Whole(Scaling(spec), _load(package)).eval()
        self._form = choose(whole, probes, device)
        for _ in range(_WARMING_CALLS):
            for probe in probes[:-1]:
                self._form(*probe)

    @property
    def form(self) -> str:
        """``eager``, ``torchscript`` or ``onnx``."""
        return self._form.name

    def predict(self, columns: Columns) -> npt.NDArray[np.float64]:
        """Return the probability of label 1, float64 [n]; ``columns`` holds each feature, [n].

        Raises:
            TrainingError: A feature column is missing.
        """
        rows = len(next(iter(columns.values()), ()))
        if rows <= _BLOCK_ROWS:
            return self._form(*self._encoder.raw(columns))
        own = self._encoder.own(columns)
        # All that is made of a block stays in a core's cache.
        return np.concatenate([self._form(*self._encoder.raw(take(own, b))) for b in _blocks(rows)])


class _Whole(nn.Module):
    """A model with the scaling of its numbers."""

    def __init__(self, scaling: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.scaling = scaling
        self.module = module

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Map float64 [n, features] and int64 [n, categories] to logits [n]."""
        logits: Tensor = self.module(self.scaling(numbers), codes)
        return logits


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _BLOCK_ROWS):
        yield slice(start, start + _BLOCK_ROWS)


def _load(package: Package) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        module = build(package.manifest.model)
    try:
        with warnings.catch_warnings():
            # The package's arrays are read-only, which is all that copying from them needs.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            module.load_state_dict({n: torch.from_numpy(a) for n, a in package.weights.items()})
    except RuntimeError as error:
        raise TrainingError(
            f"the weights do not fit {package.manifest.model.target}",
            where=str(package.path),
            why=str(error),
            fix="the class has changed since the training: train again, or take its code of then",
        ) from error
    return module.eval()


def _probe(spec: EncoderSpec, rows: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return feature columns like those of training, some missing, some extreme, some unknown."""
    random = np.random.default_rng(rows)
    columns: dict[str, npt.NDArray[np.generic]] = {}
    for name, mean, std in zip(spec.numeric, spec.means, spec.stds, strict=True):
        values = random.normal(mean, std, rows)
        kind = random.random(rows)
        values[kind < 0.1] = np.nan
        values[kind > 0.95] *= 1e6
        columns[name] = values
    for name, vocabulary in zip(spec.categorical, spec.vocabularies, strict=True):
        choices = np.array([None, "", *vocabulary], dtype=object)
        columns[name] = choices[random.integers(0, len(choices), rows)]
    return columns
