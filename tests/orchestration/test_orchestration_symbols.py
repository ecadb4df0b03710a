"""Which code counts: what a function reaches does, all else does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orchestration.packages import package

from mlops_ray.orchestration.symbols import Code, code_of

NAME = "symbol_project"
_COUNTER = itertools.count()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with package(tmp_path, NAME, {}) as made:
        yield made


def write(root: Path, file: str, text: str) -> None:
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def code(target: str = "steps.go") -> Code:
    return code_of((f"{NAME}.{target}",), (NAME,))


def names(found: Code) -> set[str]:
    return {name.removeprefix(f"{NAME}.") for name in found.symbols}


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ("from-import", f"from {NAME}.maths import f\ndef go(): return f()\n"),
        ("as", f"from {NAME}.maths import f as g\ndef go(): return g()\n"),
        ("module", f"import {NAME}.maths\ndef go(): return {NAME}.maths.f()\n"),
        ("module as", f"import {NAME}.maths as m\ndef go(): return m.f()\n"),
        ("from package", f"from {NAME} import maths\ndef go(): return maths.f()\n"),
        ("relative", "from . import maths\ndef go(): return maths.f()\n"),
        ("relative name", "from .maths import f\ndef go(): return f()\n"),
        ("local", f"def go():\n    from {NAME} import maths\n    return maths.f()\n"),
        ("star", f"from {NAME}.maths import *\ndef go(): return f()\n"),
        ("re-export", f"from {NAME}.door import f\ndef go(): return f()\n"),
        ("decorator", "from .maths import f\n@f\ndef go(): return 1\n"),
        ("default", "from .maths import f\ndef go(x=f()): return x\n"),
        ("annotation", "from .maths import f\ndef go(x: f): return x\n"),
        ("text annotation", "from .maths import f\ndef go(x: 'f | None'): return x\n"),
        ("constant", "from .maths import f\nX = f()\ndef go(): return X\n"),
        ("class", "from .maths import f\nclass C:\n    def m(self): return f()\ndef go(): C()\n"),
        (
            "base",
            "from .maths import f\nclass B:\n    def m(self): return f()\nclass C(B): ...\n"
            "def go(): C()\n",
        ),
        ("nested", "from .maths import f\ndef go():\n    def h(): return f()\n    return h\n"),
        ("lambda", "from .maths import f\ndef go(): return lambda: f()\n"),
        ("module value", "from . import maths\ndef go(): return getattr(maths, 'f')\n"),
        ("text", f"def go(load): return load('{NAME}.maths.f')\n"),
        ("branch", "try:\n    from .maths import f\nexcept ImportError:\n    f = 1\ndef go(): f\n"),
        ("effect", "from .maths import f\nf()\ndef go(): return 1\n"),
        ("entry", "from .maths import f\nD = {}\nD['f'] = f\ndef go(): return D\n"),
        ("registry", "from .maths import f\nD = []\nY = map(f, D)\nZ = D\ndef go(): return Z\n"),
    ],
)
def test_what_a_function_reaches_counts(root: Path, how: str, steps: str) -> None:
    write(root, "maths.py", "def f(): return helper()\ndef helper(): return 1\ndef g(): ...\n")
    write(root, "door.py", "from .maths import f\ndef other(): ...\n")
    write(root, "steps.py", steps)
    before = code()
    write(root, "maths.py", "def f(): return helper()\ndef helper(): return 2\ndef g(): ...\n")
    after = code()
    assert after.digest != before.digest
    changed = {n for n, digest in after.symbols.items() if before.symbols.get(n) != digest}
    assert changed == {f"{NAME}.maths.helper"}


def test_unrelated_functions_comments_and_formatting_do_not_count(root: Path) -> None:
    write(root, "maths.py", "def f():\n    return 1\n\ndef g(): return 1\n")
    write(root, "steps.py", "from .maths import f\ndef go(): return f()\ndef stop(): return 1\n")
    before = code()
    assert names(before) == {"steps.go", "maths.f"}
    write(root, "maths.py", "# about f\ndef f():\n\n    return 1  # one\ndef g(): return 2\n")
    write(root, "steps.py", "from .maths import f\ndef stop(): return 2\ndef go(): return f()\n")
    write(root, "new.py", "def f(): ...\n")
    assert code() == before


def test_a_changed_method_of_a_reached_class_counts_and_so_does_a_module_made_at_run_time(
    root: Path,
) -> None:
    write(root, "lazy.py", "def __getattr__(name): return make(name)\ndef make(name): return 1\n")
    write(root, "steps.py", "from . import lazy\ndef go(): return lazy.anything\n")
    before = code()
    write(root, "lazy.py", "def __getattr__(name): return make(name)\ndef make(name): return 2\n")
    assert code().digest != before.digest


def test_functions_that_register_themselves_count_and_so_do_subclasses_of_a_base_that_looks(
    root: Path,
) -> None:
    write(root, "table.py", "KNOWN = {}\ndef known(f):\n    KNOWN[f.__name__] = f\n    return f\n")
    write(root, "plugins.py", "from .table import known\n@known\ndef one(): return 1\n")
    write(root, "base.py", "class B:\n    def __init_subclass__(cls): pass\n")
    write(root, "subs.py", "from .base import B\nclass S(B):\n    x = 1\n")
    write(
        root,
        "steps.py",
        "from . import plugins, subs\nfrom .table import KNOWN\nfrom .base import B\n"
        "def go(): return KNOWN, B\n",
    )
    before = code()
    assert {"plugins.<import>", "subs.S", "base.B"} <= names(before)
    write(root, "plugins.py", "from .table import known\n@known\ndef one(): return 2\n")
    middle = code()
    assert middle.digest != before.digest
    write(root, "subs.py", "from .base import B\nclass S(B):\n    x = 2\n")
    assert code().digest != middle.digest


def test_importing_a_module_for_its_effects_counts_its_effects_only(root: Path) -> None:
    write(root, "loud.py", "import os\nos.environ['A'] = '1'\ndef quiet(): return 1\n")
    write(root, "steps.py", "import symbol_project.loud\ndef go(): return 1\n")
    before = code()
    assert names(before) == {"steps.go", "loud.<import>"}
    write(root, "loud.py", "import os\nos.environ['A'] = '1'\ndef quiet(): return 2\n")
    assert code() == before
    write(root, "loud.py", "import os\nos.environ['A'] = '2'\ndef quiet(): return 2\n")
    assert code().digest != before.digest


def test_code_outside_the_packages_and_programs_do_not_count(root: Path) -> None:
    write(root, "steps.py", "import json\ndef go(): return json.dumps(1)\n")
    before = code()
    write(
        root,
        "steps.py",
        "import json\ndef go(): return json.dumps(1)\nif __name__ == '__main__': go()\n",
    )
    assert code() == before
    assert names(before) == {"steps.go"}


STYLES = ("same", "from", "module", "local", "door", "default", "constant", "class")


@given(
    st.integers(2, 7).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(
                st.tuples(
                    st.integers(0, size - 1), st.integers(0, size - 1), st.sampled_from(STYLES)
                ).filter(lambda edge: edge[0] < edge[1]),
                max_size=12,
            ),
            st.lists(st.integers(0, 2), min_size=size, max_size=size),
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_changing_a_function_changes_the_key_exactly_when_it_is_reached(
    tmp_path_factory: pytest.TempPathFactory,
    graph: tuple[int, list[tuple[int, int, str]], list[int]],
) -> None:
    """The oracle is the list of calls that the package was written from."""
    size, edges, places = graph
    edges = [
        (a, b, "from" if how == "same" and places[a] != places[b] else how) for a, b, how in edges
    ]
    name = f"generated_{next(_COUNTER)}"
    reached = {0}
    for one, other, _ in sorted(edges):
        if one in reached:
            reached.add(other)
    with package(tmp_path_factory.mktemp("generated"), name, {}) as root:
        _generate(root, name, size, edges, places, changed=None)
        target, packages = (f"{name}.m{places[0]}.f0",), (name,)
        before = code_of(target, packages)
        for index in range(size):
            _generate(root, name, size, edges, places, changed=index)
            after = code_of(target, packages)
            assert (after.digest != before.digest) == (index in reached)
            differs = {n for n, digest in after.symbols.items() if before.symbols[n] != digest}
            assert differs <= {f"{name}.m{places[index]}.f{index}"}


def _generate(
    root: Path,
    name: str,
    size: int,
    edges: list[tuple[int, int, str]],
    places: list[int],
    changed: int | None,
) -> None:
    """Write modules m0 to m2 with functions f0 to fn; ``door`` re-exports all."""
    modules: dict[int, list[str]] = {0: [], 1: [], 2: []}
    tops: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for index in reversed(range(size)):
        body, defaults = [f"    x = {100 + (index == changed)}"], []
        for one, other, how in edges:
            if one != index:
                continue
            source, called = f"{name}.m{places[other]}", f"f{other}"
            if how == "same":
                body.append(f"    x += {called}()")
            elif how == "from":
                tops[places[index]].append(f"from {source} import {called} as g{other}")
                body.append(f"    x += g{other}()")
            elif how == "module":
                tops[places[index]].append(f"import {source} as n{places[other]}")
                body.append(f"    x += n{places[other]}.{called}()")
            elif how == "local":
                body.append(f"    from {source} import {called} as h{other}")
                body.append(f"    x += h{other}()")
            elif how == "door":
                body.append(f"    from {name}.door import {called} as d{other}")
                body.append(f"    x += d{other}()")
            elif how == "default":
                tops[places[index]].append(f"from {source} import {called} as e{other}")
                defaults.append(f"given{other}=e{other}")
            elif how == "constant":
                modules[places[index]].append(f"C{index}_{other} = {{'f': '{source}.{called}'}}")
                body.append(f"    x += len(C{index}_{other})")
            else:
                tops[places[index]].append(f"from {source} import {called} as k{other}")
                modules[places[index]].append(
                    f"class K{index}_{other}:\n    def call(self): return k{other}()"
                )
                body.append(f"    x += K{index}_{other}().call()")
        modules[places[index]].append(
            "\n".join([f"def f{index}({', '.join(defaults)}):", *body, "    return x"])
        )
    for place, parts in modules.items():
        text = "\n".join([*tops[place], *parts]) + "\n"
        file = root / f"m{place}.py"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    door = "\n".join(f"from .m{places[i]} import f{i}" for i in range(size)) + "\n"
    (root / "door.py").write_text(door)


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        (
            {
                "__init__.py": "from . import maths\n",
                "maths.py": "def f(): return 1\n",
                "steps.py": f"import {NAME}\ndef go(): return {NAME}.maths.f()\n",
            },
            "maths.py",
        ),
        (
            {
                "left.py": "from .right import *\ndef one(x): return len(x)\n",
                "right.py": "from .left import *\ndef two(): return 1\n",
                "steps.py": "from .left import *\ndef go(): return one(two())\n",
            },
            "right.py",
        ),
        (
            {
                "other.py": "def f(): return 0\n",
                "steps.py": "def f(): return 1\ndef go():\n    def inner():\n"
                "        from .other import f\n        return f()\n    return inner() + f()\n",
            },
            "steps.py",
        ),
        (
            {
                "steps.py": "class B: pass\nclass S(B):\n    def f(self): return 1\n"
                "def go(): return [c().f() for c in B.__subclasses__()]\n"
            },
            "steps.py",
        ),
        (
            {
                "steps.py": "class B: pass\nclass S(B):\n    def f(self): return 1\n"
                "def all_of(c): return c.__subclasses__()\n"
                "def go(): return [c().f() for c in all_of(B)]\n"
            },
            "steps.py",
        ),
        (
            {
                "impl.py": "def f(): return 1\n",
                "steps.py": "from importlib import import_module\n"
                "def go(): return import_module('.impl', __package__).f()\n",
            },
            "impl.py",
        ),
        (
            {
                "steps.py": "import random\n_ = random.seed(len('return 1'))\n"
                "def go(): return random.random()\n"
            },
            "steps.py",
        ),
    ],
    ids=[
        "package that imports its module",
        "star imports in a ring",
        "local import hides a name elsewhere",
        "subclasses looked up outside the class",
        "subclasses of what is not known",
        "module beside this one by text",
        "value that nobody wants",
    ],
)
def test_what_a_review_found_unseen_counts(root: Path, files: dict[str, str], changed: str) -> None:
    for file, text in files.items():
        write(root, file, text)
    before = code().digest
    assert "return 1" in files[changed]
    write(root, changed, files[changed].replace("return 1", "return 345"))
    assert code().digest != before
