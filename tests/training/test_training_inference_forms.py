from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training.test_training_inference import make
from training.training_samples import rows

from mlops_ray.metadata import package as packages
from mlops_ray.training import forms
from mlops_ray.training.dataset import TableColumns
from mlops_ray.training.inference import Predictor
from mlops_ray.training.loop import build
from mlops_ray.training.models import TabularNet

WIDTH, CODES = 6, (5, 3)
SEED = 7


class Branching(nn.Module):
    """Takes another way where a number is large, and for an even number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        if bool((x_num > 3.5).any()):
            return self.high(x_num).squeeze(1)
        if x_num.shape[0] % 2 == 0:
            return -self.low(x_num).squeeze(1)
        return self.low(x_num).squeeze(1)


class Fickle(nn.Module):
    """Compiled, it answers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        logits = self.linear(x_num).squeeze(1)
        if torch.jit.is_scripting():
            logits = logits + 1e-4
        return logits


class OneRowOnly(nn.Module):
    """Compiled, it cannot take more than a row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        logits = self.linear(x_num).squeeze(1)
        if torch.jit.is_scripting():
            return logits.reshape(1)
        return logits


class Numbers(nn.Module):
    """Reads no categories."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        return self.linear(x_num).squeeze(1)


def encoded(count: int, seed: int = SEED) -> forms.Inputs:
    random = np.random.default_rng(seed)
    numeric = random.normal(0, 2, (count, WIDTH)).astype(np.float32)
    codes = np.stack([random.integers(0, size, count) for size in CODES], axis=1)
    return numeric, codes


PROBES = [encoded(count) for count in (1, 2, 5, 64, 1024)]


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return kind().eval()


def own_scores(module: nn.Module, inputs: forms.Inputs) -> np.ndarray:
    with torch.no_grad():
        logits = module(*(torch.from_numpy(part) for part in inputs)).double().numpy()
    return 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def net() -> TabularNet:
    torch.manual_seed(SEED)
    return TabularNet(WIDTH, CODES, [32, 16]).eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> packages.Package:
    return make(tmp_path_factory.mktemp("package"))


def test_the_usual_network_runs_in_all_forms(net):
    found = forms._forms(net, PROBES, "cpu", with_onnx=True)
    assert [form.name for form in found] == ["eager", "torchscript", "onnx"]
    for count in (1, 2, 3, 32, 700, 5000):
        inputs = encoded(count, seed=count)
        for form in found:
            scores = form(*inputs)
            assert scores.dtype == np.float64
            np.testing.assert_allclose(scores, own_scores(net, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Fickle, OneRowOnly])
def test_a_form_that_answers_otherwise_is_not_taken(kind):
    module = seeded(kind)
    assert forms.frozen(module, PROBES).name == "eager"
    assert forms.fastest(module, PROBES).name == "eager"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.booleans())
def test_a_module_that_branches_does_so_in_every_form_that_is_kept(count, seed, large):
    if not hasattr(Branching, "forms"):
        Branching.forms = forms._forms(seeded(Branching), PROBES, "cpu", with_onnx=True)
    numeric, codes = encoded(count, seed)
    numeric = np.clip(numeric, -3, 3)
    if large:
        numeric[-1, 0] = 3.9
    wanted = own_scores(seeded(Branching), (numeric, codes))
    assert "torchscript" in [form.name for form in Branching.forms]
    for form in Branching.forms:
        np.testing.assert_allclose(form(numeric, codes), wanted, rtol=0, atol=1e-6)


def test_an_input_that_is_not_read_may_be_left_out_of_the_exported_model():
    module = seeded(Numbers)
    onnx = next(f for f in forms._forms(module, PROBES, "cpu", with_onnx=True) if f.name == "onnx")
    inputs = encoded(9)
    np.testing.assert_allclose(onnx(*inputs), own_scores(module, inputs), rtol=0, atol=1e-6)


def test_a_network_without_categories_runs_in_all_forms():
    torch.manual_seed(SEED)
    module = TabularNet(WIDTH, [], [8]).eval()
    probes = [(numeric, np.empty((len(numeric), 0), dtype=np.int64)) for numeric, _ in PROBES]
    for form in forms._forms(module, probes, "cpu", with_onnx=True):
        wanted = own_scores(module, probes[2])
        np.testing.assert_allclose(form(*probes[2]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("times_s", "picked"),
    [
        ([[3.0], [4.0]], 0),
        ([[3.0, 2.0], [4.0, 3.0]], 1),
        ([[3.0, 2.9], [4.0, 2.0]], 0),
        ([[3.0, 2.0], [4.0, 3.9]], 0),
        ([[3.0, 2.0, 1.9], [4.0, 3.0, 2.9]], 1),
        ([[3.0, 2.0, 1.0], [4.0, 3.0, 2.0]], 2),
        ([[3.0, 5.0, 1.0], [4.0, 5.0, 2.0]], 2),
    ],
)
def test_what_is_clearly_faster_on_both_counts_of_rows_is_picked(times_s, picked):
    assert forms.pick(times_s) == picked


def test_the_measurement_tells_slow_from_fast(net):
    class Slow:
        name = "slow"

        def __call__(self, numeric, codes):
            for _ in range(30):
                fast(numeric, codes)
            return fast(numeric, codes)

    fast = forms._forms(net, PROBES, "cpu", with_onnx=False)[0]
    slow_s, fast_s = forms._measure([Slow(), fast], encoded(32))
    assert fast_s < slow_s


def test_without_onnx_runtime_its_form_is_not_tried(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = forms._forms(net, PROBES, "cpu", with_onnx=True)
    assert [form.name for form in found] == ["eager", "torchscript"]


def test_large_models_are_not_exported(net, monkeypatch):
    kept = sum(weight.numel() * weight.element_size() for weight in net.parameters())
    monkeypatch.setattr(forms, "_MOST_WEIGHTS_BYTES", kept // 2)
    assert forms._forms(net, PROBES, "cpu", with_onnx=True)[-1].name == "torchscript"


def test_the_usual_form_gives_the_frozen_modules_bits(package):
    module = build(package.manifest.model)
    module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in package.weights.items()})
    frozen = torch.jit.freeze(torch.jit.script(module.eval()))
    predictor = Predictor(package)
    for count in (1, 2, 33, 3000):
        columns = TableColumns(rows(count, seed=count))
        inputs = [torch.from_numpy(part) for part in predictor._encoder.encode(columns)]
        with torch.inference_mode():
            wanted = torch.sigmoid(frozen(*inputs).double()).numpy()
        assert predictor.predict(columns).tobytes() == wanted.tobytes()


def test_the_fastest_form_gives_the_usual_scores(package):
    usual, fastest = Predictor(package), Predictor(package, fastest=True)
    assert fastest.form in ("eager", "torchscript", "onnx")
    for count in (1, 32, 20_000):
        columns = TableColumns(rows(count, seed=count))
        found = fastest.predict(columns)
        np.testing.assert_allclose(found, usual.predict(columns), rtol=0, atol=1e-6)


def test_many_rows_are_scored_in_blocks_that_join_up(package, monkeypatch):
    columns = TableColumns(rows(100))
    predictor = Predictor(package)
    whole = predictor.predict(columns)
    monkeypatch.setattr("mlops_ray.training.inference._BLOCK_ROWS", 33)
    np.testing.assert_allclose(predictor.predict(columns), whole, rtol=0, atol=1e-6)


def test_no_rows_have_no_scores(package):
    empty = {name: values[:0] for name, values in TableColumns(rows(3)).items()}
    assert Predictor(package).predict(empty).shape == (0,)


def test_a_predictor_keeps_no_second_copy_of_the_weights(package):
    read = packages.read(package.path)
    arrays = [weakref.ref(array) for array in read.weights.values()]
    predictor = Predictor(read, fastest=True)
    del read
    gc.collect()
    assert [ref() for ref in arrays] == [None] * len(arrays)
    assert predictor.form
