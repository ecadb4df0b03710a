"""The forms that a module can run in: as it is, as frozen TorchScript, by ONNX Runtime.

A form is taken only where it gives the module's own scores, on probes that the caller brings.
"""

from __future__ import annotations

import io
import math
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Inputs = tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.int64]]
Scores = npt.NDArray[np.float64]

EAGER, TORCHSCRIPT, ONNX = "eager", "torchscript", "onnx"

_TOLERANCE = 1e-6
_MARGIN = 0.85
_MEASURED_ROWS = (1, 32)
_ROUNDS = 5
_ROUND_S = 0.001
_MOST_WEIGHTS_BYTES = 64 << 20

# TorchScript's compiler and the exporter to ONNX keep state of the whole process.
_compiling = threading.Lock()


class Form(Protocol):
    """A module in one of its forms; ``name`` says which."""

    name: str

    def __call__(
        self, numeric: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.int64]
    ) -> Scores:
        """Return the scores, float64 [n], of rows: numbers [n, k], of one dtype, and int64 [n, c]."""


def frozen(module: nn.Module, probes: Sequence[Inputs], device: str = "cpu") -> Form:
    """Return the frozen TorchScript form where it can be had, and otherwise the module itself.

    Which one it is follows from the module alone, so that the same package gives the same scores,
    bit for bit, on machines of one kind.
    """
    return _forms(module, probes, device, with_onnx=False)[-1]


def fastest(module: nn.Module, probes: Sequence[Inputs], device: str = "cpu") -> Form:
    """Return the fastest form, by a short measurement with 1 and 32 rows (see ``pick``)."""
    found = _forms(module, probes, device, with_onnx=True)
    if len(found) == 1:
        return found[0]
    times_s = [_measure(found, _sized(probes, rows)) for rows in _MEASURED_ROWS]
    return found[pick(times_s)]


def pick(times_s: Sequence[Sequence[float]]) -> int:
    """Return the place of the form to take; ``times_s`` [row counts, forms], the plainest form first.

    One takes the place of a plainer one where it needs less than 85 % of its time for every count of
    rows, so that noise does not decide between equals.
    """
    best = 0
    for place in range(1, len(times_s[0])):
        if all(of_rows[place] < _MARGIN * of_rows[best] for of_rows in times_s):
            best = place
    return best


class _Scored(nn.Module):
    """Adds the last step, so that compiled forms run it too: logits to scores in float64."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        """Map rows to scores, float64 [n]."""
        return torch.sigmoid(self.module(x_num, x_cat).double())


class _TorchForm:
    """A torch module, compiled or not."""

    def __init__(self, name: str, module: Any, device: str) -> None:
        self.name = name
        self._module = module
        self._device = None if device == "cpu" else torch.device(device)

    def __call__(
        self, numeric: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.int64]
    ) -> Scores:
        """Return the scores of rows."""
        with torch.inference_mode():
            x_num, x_cat = torch.from_numpy(numeric), torch.from_numpy(codes)
            if self._device is None:
                found = self._module(x_num, x_cat)
            else:
                found = self._module(x_num.to(self._device), x_cat.to(self._device)).cpu()
            scores: Scores = found.numpy()
        return scores


class _OnnxForm:
    """A session of ONNX Runtime that uses the calling thread alone."""

    name = ONNX

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._run = session.run
        # The exporter leaves out an input that the module does not use.
        self._named = {found.name for found in session.get_inputs()}

    def __call__(
        self, numeric: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.int64]
    ) -> Scores:
        """Return the scores of rows."""
        given = {"x_num": numeric, "x_cat": codes}
        if len(self._named) < len(given):
            given = {name: given[name] for name in self._named}
        scores: Scores = self._run(["scores"], given)[0]
        return scores


def _forms(
    module: nn.Module, probes: Sequence[Inputs], device: str, *, with_onnx: bool
) -> list[Form]:
    """Return the forms that give equal scores, the plainest first."""
    scored = _Scored(module).eval().to(device)
    eager = _TorchForm(EAGER, scored, device)
    forms: list[Form] = [eager]
    expected = [eager(*probe) for probe in probes]
    with _compiling:
        script = _script(scored)
        model = _export(script, probes) if with_onnx and device == "cpu" else None
    if script is not None:
        forms.append(_TorchForm(TORCHSCRIPT, script, device))
    if model is not None:
        forms.append(_OnnxForm(model))
    return [eager, *(form for form in forms[1:] if _equal(form, probes, expected))]


def _script(scored: nn.Module) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.freeze(torch.jit.script(scored))
    # TorchScript refuses what it does not know with errors of many classes; eager always works.
    except Exception:
        return None


def _export(script: Any, probes: Sequence[Inputs]) -> bytes | None:
    """Return the ONNX form of a scripted module, whose control flow it keeps, or None.

    How long an export takes grows with the weights, so large models go without.
    """
    if script is None or not _has_onnx() or _weights_bytes(script) > _MOST_WEIGHTS_BYTES:
        return None
    numeric, codes = _sized(probes, 2)
    file: Any = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The newer exporter takes seconds, in which no other thread gets to run.
            torch.onnx.export(
                script,
                (torch.from_numpy(numeric), torch.from_numpy(codes)),
                file,
                dynamo=False,
                input_names=["x_num", "x_cat"],
                output_names=["scores"],
                dynamic_axes={"x_num": {0: "n"}, "x_cat": {0: "n"}, "scores": {0: "n"}},
            )
        exported: bytes = file.getvalue()
        return exported
    # The exporter has errors of many classes for operators that ONNX lacks.
    except Exception:
        return None


def _has_onnx() -> bool:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def _weights_bytes(script: Any) -> int:
    graph = script.graph
    constants = (node.t("value") for node in graph.findAllNodes("prim::Constant") if _holds(node))
    return sum(tensor.numel() * tensor.element_size() for tensor in constants)


def _holds(node: Any) -> bool:
    return node.hasAttribute("value") and node.kindOf("value") == "t"


def _equal(form: Form, probes: Sequence[Inputs], expected: Sequence[Scores]) -> bool:
    try:
        found = [form(*probe) for probe in probes]
    # What fails on a probe is not this module's form, whatever the reason.
    except Exception:
        return False
    return all(
        scores.dtype == np.float64
        and scores.shape == wanted.shape
        and np.allclose(wanted, scores, rtol=0, atol=_TOLERANCE, equal_nan=True)
        for scores, wanted in zip(found, expected, strict=True)
    )


def _sized(probes: Sequence[Inputs], rows: int) -> Inputs:
    """Return rows, repeated or cut to this many."""
    numeric, codes = max(probes, key=lambda probe: len(probe[0]))
    places = np.arange(rows) % len(numeric)
    return numeric[places], codes[places]


def _measure(forms: Sequence[Form], inputs: Inputs) -> list[float]:
    """Return the least time of one call in seconds, the forms by turns."""
    best_s = [math.inf] * len(forms)
    for _ in range(_ROUNDS):
        for place, form in enumerate(forms):
            end_s = time.perf_counter() + _ROUND_S
            while True:
                started_s = time.perf_counter()
                form(*inputs)
                now_s = time.perf_counter()
                best_s[place] = min(best_s[place], now_s - started_s)
                if now_s >= end_s:
                    break
    return best_s
