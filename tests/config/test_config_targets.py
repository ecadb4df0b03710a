from __future__ import annotations

from pathlib import Path

import pytest

from mlops_ray.config.targets import load
from mlops_ray.errors import MlopsRayError


def test_names_of_functions_and_classes() -> None:
    assert load("pathlib.Path") is Path
    assert load("os.path.join")("a", "b") == "a/b"


def test_each_way_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    (tmp_path / "fails_at_once.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for target, message in (
        ("nowhere.function", r"no module 'nowhere'[\s\S]*not on the import path"),
        ("pathlib.Pat", r"'pathlib' has no 'Pat'[\s\S]*names in it: .*Path"),
        ("needs_more.x", r"no module 'not_installed_here'[\s\S]*needs_more imports it"),
        ("fails_at_once.x", r"cannot be imported[\s\S]*ZeroDivisionError"),
    ):
        with pytest.raises(MlopsRayError, match=message):
            load(target)
