"""Cache keys: what changes them, what does not, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestration.packages import package

from mlops_ray.config.workflow import Step
from mlops_ray.metadata.artifacts import ArtifactRef, open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.keys import StepKey, code_digest, item_key
from mlops_ray.orchestration.resolution import arguments_of, element_digest, elements_of, key_of

NAME = "keyed_project"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    files = {
        "steps.py": "from .maths import f\ndef go(**inputs): return f()\n",
        "maths.py": "def f(): return 1\n",
        "other.py": "X = 1\n",
    }
    with package(tmp_path, NAME, files) as made:
        yield made


class Bench:
    """A store with outputs of steps a and b, and keys of steps that use them."""

    def __init__(self, home: Home) -> None:
        self.artifacts = open_artifacts(home)
        self.outputs: dict[str, ArtifactRef] = {}
        self.give(a={"x": 1, "y": [1, 2]}, b="text")

    def give(self, **values: Any) -> None:
        for name, value in values.items():
            self.outputs[name] = self.artifacts.put(value)

    def key(self, ensured: frozenset[str] = frozenset(), **step: Any) -> StepKey:
        made = Step.model_validate({"uses": f"{NAME}.steps.go"} | step)
        return key_of(made, self.outputs, self.artifacts, (NAME,), ensured=ensured)


@pytest.fixture
def bench(root: Path, home: Home) -> Bench:
    return Bench(home)


def given(**inputs: Any) -> dict[str, Any]:
    return {"with": inputs}


def test_parts_say_what_the_key_was_made_of(bench: Bench) -> None:
    key = bench.key(**given(n=1, table="$a", part="$a.x", mixed={"one": "$b", "two": [2]}))
    assert key.parts["target"] == f"{NAME}.steps.go"
    assert set(key.parts["code"]) == {f"{NAME}.steps.go", f"{NAME}.maths.f"}
    assert key.parts["inputs"] == {
        "n": {"config": 1},
        "table": {"step": "a", "digest": bench.outputs["a"].digest},
        "part": {"step": "a", "part": ["x"], "value": 1},
        "mixed.one": {"step": "b", "digest": bench.outputs["b"].digest},
        "mixed.two": {"config": [2]},
    }


def test_inputs_and_selected_parts_count_but_not_their_order_nor_what_is_not_selected(
    bench: Bench,
) -> None:
    key = bench.key(**given(x="$a.x", n=1)).key
    assert key == bench.key(**given(n=1, x="$a.x")).key
    assert key != bench.key(**given(n=2, x="$a.x")).key
    bench.give(a={"x": 1, "y": []})
    assert key == bench.key(**given(x="$a.x", n=1)).key
    bench.give(a={"x": 2})
    assert key != bench.key(**given(x="$a.x", n=1)).key


def test_the_name_of_the_step_that_gave_an_input_does_not_count(bench: Bench) -> None:
    bench.outputs["renamed"] = bench.outputs["a"]
    assert bench.key(**given(x="$a")).key == bench.key(**given(x="$renamed")).key


def test_an_ensured_output_counts_by_its_name_alone(bench: Bench) -> None:
    before = bench.key(frozenset({"a"}), **given(x="$a")).key
    bench.give(a="another")
    assert bench.key(frozenset({"a"}), **given(x="$a")).key == before
    assert bench.key(**given(x="$a")).key != before


def test_the_declared_environment_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.key()
    packaged = bench.key(environment={"packages": ["pydantic", "no-such-package"]})
    assert packaged.parts["environment"]["packages"]["no-such-package"] is None
    assert packaged.parts["environment"]["packages"]["pydantic"][0].isdigit()
    monkeypatch.setenv("KEY_TEST", "secret")
    variables = bench.key(environment={"variables": ["KEY_TEST"]})
    monkeypatch.setenv("KEY_TEST", "changed")
    changed = bench.key(environment={"variables": ["KEY_TEST"]})
    runtime = bench.key(environment={"runtime": {"pip": ["x"]}})
    keys = {key.key for key in (plain, packaged, variables, changed, runtime)}
    assert len(keys) == 5
    assert "secret" not in str(variables.parts)


@pytest.mark.parametrize("name", ["pip", "uv", "py_modules", "working_dir"])
def test_what_the_files_of_a_runtime_environment_hold_counts(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    file = folder / "requirements.txt"
    path = str(file if name in ("pip", "uv") else folder)
    runtime = {name: [path] if name == "py_modules" else path}
    keys = []
    for text in ("numpy==1", "numpy==2", "numpy==1"):
        file.write_text(text)
        keys.append(bench.key(environment={"runtime": runtime}).key)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_variables_of_a_runtime_environment_count_and_are_not_shown(bench: Bench) -> None:
    one, other = (
        bench.key(environment={"runtime": {"env_vars": {"TOKEN": value}}})
        for value in ("s3cr3t", "changed")
    )
    assert one.key != other.key
    assert set(one.parts["environment"]["runtime"]["env_vars"]) == {"TOKEN"}
    assert "s3cr3t" not in str(one.parts)


def test_resources_and_retries_do_not_count(bench: Bench) -> None:
    assert bench.key().key == bench.key(resources={"num_cpus": 2}, retries=3, priority=7).key


def test_each_call_of_a_mapped_step_has_a_key_of_its_own_whatever_else_is_in_the_list(
    bench: Bench,
) -> None:
    def keys(values: list[int]) -> tuple[str, list[str]]:
        bench.give(parts=values)
        step = Step.model_validate({"uses": f"{NAME}.steps.go", "map": {"part": "$parts"}})
        parent = key_of(step, bench.outputs, bench.artifacts, (NAME,))
        calls = elements_of(step, bench.outputs, bench.artifacts)
        digests = [{n: element_digest(a) for n, a in call.items()} for call in calls]
        return parent.key, [item_key(parent, digest).key for digest in digests]

    whole, (one, two) = keys([1, 2])
    other, (three, again) = keys([3, 1])
    assert whole != other
    assert again == one
    assert len({one, two, three}) == 3


def test_code_named_by_the_inputs_counts(root: Path) -> None:
    inputs = {"source": {"read": f"{NAME}.other.X"}}
    before = code_digest(f"{NAME}.steps.go", inputs, [NAME])
    assert before != code_digest(f"{NAME}.steps.go", None, [NAME])
    (root / "other.py").write_text("X = 2\n")
    assert code_digest(f"{NAME}.steps.go", inputs, [NAME]) != before


@pytest.mark.parametrize(
    "inputs",
    [f"{NAME}.other:X", {f"{NAME}.other.X": 1}, f"score by {NAME}.other.X, twice"],
)
def test_names_in_keys_and_in_longer_text_count(root: Path, inputs: Any) -> None:
    before = code_digest(f"{NAME}.steps.go", inputs, [NAME])
    (root / "other.py").write_text("X = 22\n")
    assert code_digest(f"{NAME}.steps.go", inputs, [NAME]) != before


def test_a_file_that_a_pure_step_is_given_as_a_path_counts(bench: Bench, root: Path) -> None:
    (root / "steps.py").write_text(
        "from pathlib import Path\ndef go(path: Path, more: list[Path], name: str): return 1\n"
    )
    file = root / "orders.csv"

    def keys() -> list[str]:
        inputs = ({"path": str(file)}, {"more": [str(file)]}, {"name": str(file)})
        made = [bench.key(**given(**i)).key for i in inputs]
        return [*made, bench.key(**given(path=str(file)), mode="effect").key]

    file.write_text("1")
    before = keys()
    file.write_text("22")
    changed = [one != other for one, other in zip(before, keys(), strict=True)]
    assert changed == [True, True, False, False]


def test_files_of_the_runtime_environment_count_and_its_variables_stay_secret(
    bench: Bench, tmp_path: Path
) -> None:
    requirements, library = tmp_path / "requirements.txt", tmp_path / "library"
    (library / "__pycache__").mkdir(parents=True)

    def keys() -> list[str]:
        runtimes: list[dict[str, Any]] = [
            {"pip": str(requirements)},
            {"uv": {"packages": [f"-r {requirements}"]}},
            {"py_modules": [str(library)]},
        ]
        return [bench.key(environment={"runtime": runtime}).key for runtime in runtimes]

    found: list[list[str]] = []
    for text in ("a==1", "a==2.0"):
        requirements.write_text(text)
        (library / "code.py").write_text(text)
        found.append(keys())
    assert all(one != other for one, other in zip(*found, strict=True))
    (library / "__pycache__" / "code.pyc").write_text("made at import")
    assert keys() == found[1]
    secret = bench.key(environment={"runtime": {"env_vars": {"TOKEN": "s3cr3t"}}})
    other = bench.key(environment={"runtime": {"env_vars": {"TOKEN": "s3cr3ts"}}})
    assert "s3cr3t" not in str(secret.parts)
    assert secret.key != other.key


def test_an_escaped_dollar_reaches_the_function_as_one(bench: Bench) -> None:
    step = Step.model_validate({"uses": "a.b", "with": {"text": "$$HOME", "deep": ["$$a"]}})
    assert arguments_of(step, {}, bench.artifacts) == {"text": "$HOME", "deep": ["$a"]}
