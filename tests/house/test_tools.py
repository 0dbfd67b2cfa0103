"""The measurements of tools/house.py on code small enough to count by hand."""

import ast
import importlib
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))
source_tree: Any = importlib.import_module("source_tree")
house: Any = importlib.import_module("house")


def function(text: str) -> Any:
    return next(source_tree.functions(ast.parse(textwrap.dedent(text)), "m"))


def tree(folder: Path, files: dict[str, str]) -> Any:
    for name, text in files.items():
        path = folder / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return source_tree.Tree(folder / "package")


@pytest.mark.parametrize(
    ("body", "branches"),
    [
        ("return x", 1),
        ("if x: pass\nelif y: pass\nelse: pass", 3),
        ("for a in x:\n    while a: break", 3),
        ("try: pass\nexcept ValueError: pass\nexcept KeyError: pass\nfinally: pass", 3),
        ("return 1 if x else 2", 2),
        ("return x and y and z or w", 4),
        ("return [a for b in x if b if y for a in b]", 5),
        ("assert x, y", 2),
        ("match x:\n    case 1: pass\n    case _: pass", 3),
        ("def inner():\n    if x: pass\nreturn lambda: 1 if y else 2", 3),
    ],
)
def test_branches(body: str, branches: int) -> None:
    assert function(f"def f():\n{textwrap.indent(body, '    ')}").branches == branches


def test_lines_are_those_without_the_docstring() -> None:
    found = function('''
        @decorated
        def f(
            a,
        ):
            """One.

            Two.
            """
            x = """not a
            docstring"""
            return x
    ''')
    assert (found.lines, found.arguments) == (6, 1)


def test_parameters_of_all_kinds_are_counted() -> None:
    found = function("def f(self, a, /, b, *c, d, **e): pass")
    assert found.parameters == ("a", "b", "c", "d", "e")
    assert found.arguments == 6


def test_repeated_signatures(tmp_path: Path) -> None:
    text = """
        from typing import overload
        class A:
            def f(self, a, b, c, d, e, f): pass
            def short(self, a, b, c, d, e): pass
        class B:
            def f(self, a, b, c, d, e, *, f=1): pass
            def short(self, a, b, c, d, e): pass
        @overload
        def g(a, b, c, d, e, f): pass
        def another_order(b, a, c, d, e, f): pass
    """
    (group,) = tree(tmp_path, {"one": text}).repeated(6)
    assert [f.name for f in group] == ["A.f", "B.f"]


def test_arrows_and_circles(tmp_path: Path) -> None:
    types_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import package.low.c"
    files = {
        "__init__": "from package.low.a import f",
        "low/a": "def f():\n    from package.high import b\n",
        "low/c": "from . import a\nimport package.high.d\n",
        "high/b": "from package.low.a import f",
        "high/d": f"from ..low.a import f\n{types_only}",
    }
    found = tree(tmp_path, files)
    late = {("low.a", "high.b"), ("high.d", "low.c")}
    soon = {(who, "low.a") for who in ("__init__", "low.c", "high.b", "high.d")} | {("low.c", "high.d")}
    assert found.arrows(rooms=False, late=False) == soon
    assert found.arrows(rooms=False, late=True) == soon | late
    assert found.circles(rooms=False) == []
    assert found.circles(rooms=True) == [["high", "low"]]


def test_parts_of_layouts_with_and_without_rooms(tmp_path: Path) -> None:
    flat_names = ("reference", "vocabulary_sweep", "tap", "lab/reproduce/cost", "lab/a")
    flat = tree(tmp_path / "flat", dict.fromkeys(flat_names, ""))
    names = ("reference", "theory/reference", "capture/tap", "papers/cost")
    rooms = tree(tmp_path / "rooms", dict.fromkeys(names, ""))
    parts = lambda t: {m.name: m.part for m in t.modules.values()}
    assert parts(flat) == {
        "reference": "theory",
        "vocabulary_sweep": "vocabulary",
        "tap": "core",
        "lab.reproduce.cost": "papers",
        "lab.a": "lab",
    }
    assert parts(rooms) == {
        "reference": "core",
        "theory.reference": "theory",
        "capture.tap": "core",
        "papers.cost": "papers",
    }


def test_comments_for_tools_are_no_comments() -> None:
    assert source_tree.comment_lines("x = 1  # because\n# noqa: E501\ny = '# no'  # type: ignore\n") == 1


def test_what_breaks_a_limit_is_named(tmp_path: Path) -> None:
    found = tree(tmp_path, {"long": "x = 1\n" * 9})
    limits = {**house.LIMITS, "lines of a module": 8}
    assert house.violations(found, tmp_path, limits)["lines of a module"] == ["long: 9 > 8"]
