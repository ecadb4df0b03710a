"""Cache keys: what changes them and what does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlops_ray.orchestration.keys import code_digest, step_key


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "keyed_project"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "steps.py").write_text(
        "from keyed_project import maths\ndef go(): return maths.f()\n"
    )
    (folder / "maths.py").write_text("def f():\n    return 1\n")
    (folder / "other.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("keyed_project")]:
        del sys.modules[name]


def digest(inputs: object = None) -> str:
    return code_digest("keyed_project.steps.go", inputs, ["keyed_project"])


def test_code_of_imported_project_modules_counts(package: Path) -> None:
    before = digest()
    (package / "maths.py").write_text("def f():\n    return 2  # changed\n")
    assert digest() != before


def test_comments_and_unrelated_modules_do_not_count(package: Path) -> None:
    before = digest()
    (package / "maths.py").write_text("# a comment\ndef f():\n\n    return 1\n")
    (package / "other.py").write_text("X = 2\n")
    assert digest() == before


def test_code_named_by_the_inputs_counts(package: Path) -> None:
    inputs = {"source": {"read": "keyed_project.other.X"}}
    before = digest(inputs)
    (package / "other.py").write_text("X = 2\n")
    assert digest(inputs) != before


def test_key_depends_on_inputs_but_not_on_their_order() -> None:
    assert step_key("a.b", "c", {"x": 1, "y": 2}) == step_key("a.b", "c", {"y": 2, "x": 1})
    assert step_key("a.b", "c", {"x": 1}) != step_key("a.b", "c", {"x": 2})
    assert step_key("a.b", "c", {"x": 1}) != step_key("a.b", "d", {"x": 1})
