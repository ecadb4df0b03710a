"""Packages written by a test, importable while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def package(folder: Path, name: str, files: Mapping[str, str]) -> Iterator[Path]:
    """Write a package's modules and put its folder on the import path."""
    root = folder / name
    root.mkdir(parents=True, exist_ok=True)
    (root / "__init__.py").touch()
    for file, text in files.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        yield root
    finally:
        sys.path.remove(str(folder))
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
