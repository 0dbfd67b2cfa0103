"""The source tree as data: its modules, functions and imports, read from the syntax tree; nothing is imported.

A room is a folder of modules; a module at the top of the package is a room of its own.
"""

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SIDES = ("lab", "papers", "cli", "integrations", "vocabulary", "theory", "plot")
# public paths and old modules at the top whose content is another part's
FLAT = {"linear_cross_entropy": "vocabulary", "reference": "theory", "reparam": "theory", "landscape": "theory"}
GROUPS = {"core": ("core",), "lab + papers": ("lab", "papers"), "all": ("core", *SIDES)}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (*DEFINITIONS, ast.ClassDef, ast.Module)
PRAGMAS = ("type:", "noqa", "pragma:", "fmt:", "!")


@dataclass(frozen=True)
class Function:
    """One function or method; functions inside it belong to it too.

    Attributes:
        module: dotted name of its module within the package.
        name: its name, after those of the classes and functions it stands in.
        line: where it begins.
        lines: from ``def`` to its end, without the docstring.
        branches: 1 + what can send it one of two ways.
        parameters: names of its parameters, without ``self`` and ``cls``.
        arguments: how many parameters it has, ``self`` too.
        overload: whether it is a declaration of types only.
    """

    module: str
    name: str
    line: int
    lines: int
    branches: int
    parameters: tuple[str, ...]
    arguments: int
    overload: bool

    def __str__(self) -> str:
        """Where it is."""
        return f"{self.module}:{self.line} {self.name}"


@dataclass(frozen=True)
class Module:
    """One file.

    Attributes:
        name: dotted name within the package; ``__init__`` stands for the package itself.
        part: core, lab, papers, cli, integrations, vocabulary, theory or plot.
        room: its folder, or itself at the top.
        lines: all of its lines.
        comments: lines with a comment that is not addressed to a tool.
        docstrings: lines of docstrings.
        functions: those defined in it.
        imports: names within the package it imports when it is imported.
        late: names it imports inside functions or for type checkers only.
    """

    name: str
    part: str
    room: str
    lines: int
    comments: int
    docstrings: int
    functions: list[Function] = field(repr=False)
    imports: frozenset[str] = field(repr=False)
    late: frozenset[str] = field(repr=False)


def branches(node: ast.AST) -> int:
    """1 + if, loop, except, ternary, assert, ``for`` and ``if`` of comprehensions, operand, case of a match."""
    single = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
    count = 1
    for part in ast.walk(node):
        if isinstance(part, single):
            count += 1
        elif isinstance(part, ast.comprehension):
            count += 1 + len(part.ifs)
        elif isinstance(part, ast.BoolOp):
            count += len(part.values) - 1
    return count


def docstring_lines(node: ast.AST) -> int:
    """How many lines the docstring of a module, class or function takes."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return (first.end_lineno or first.lineno) - first.lineno + 1
    return 0


def functions(tree: ast.AST, module: str, within: str = "") -> Iterator[Function]:
    """All functions of a syntax tree, from the outside in."""
    for node in ast.iter_child_nodes(tree):
        name = f"{within}{getattr(node, 'name', '')}"
        if isinstance(node, DEFINITIONS):
            a = node.args
            every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
            named = [p.arg for p in every]
            yield Function(
                module,
                name,
                node.lineno,
                (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node),
                branches(node),
                tuple(named[1:] if named[:1] in (["self"], ["cls"]) else named),
                len(named),
                any(ast.unparse(d).endswith("overload") for d in node.decorator_list),
            )
        inside = f"{name}." if isinstance(node, (*DEFINITIONS, ast.ClassDef)) else within
        yield from functions(node, module, inside)


def imports(node: ast.AST, package: str, here: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Names within the package that a module imports, and whether only later: in a function, or for types.

    Args:
        node: the module, or a part of it.
        package: name of the package.
        here: names of the folders the module stands in, within the package.
    """
    yield from ((name, False) for name in _imported(node, package, here))
    types_only = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
    for part in ast.iter_child_nodes(node):
        later = isinstance(node, DEFINITIONS) or part in types_only
        yield from ((name, late or later) for name, late in imports(part, package, here))


def _imported(node: ast.AST, package: str, here: tuple[str, ...]) -> list[str]:
    """What one import statement takes from the package."""
    if isinstance(node, ast.Import):
        full = [alias.name.split(".") for alias in node.names]
        return [".".join(rest) for top, *rest in full if top == package]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module.split(".") if node.module else []
    if node.level:
        base = [package, *here[: len(here) + 1 - node.level], *base]
    return [".".join([*base[1:], alias.name]) for alias in node.names] if base[:1] == [package] else []


def comment_lines(text: str) -> int:
    """Lines with a comment for a reader."""
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (t.string.lstrip("#").strip() for t in found if t.type == tokenize.COMMENT)
    return sum(not c.startswith(PRAGMAS) for c in comments)


@dataclass(frozen=True)
class Tree:
    """A package: its modules and how they import each other."""

    package: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        """All modules by name."""
        files = sorted(self.package.rglob("*.py"))
        found = [self._module(f.relative_to(self.package)) for f in files]
        return {m.name: m for m in found}

    def _module(self, path: Path) -> Module:
        text = (self.package / path).read_text()
        tree, folders = ast.parse(text), path.parts[:-1]
        name = ".".join((*folders, path.stem)).removesuffix(".__init__")
        seen = list(imports(tree, self.package.name, folders))
        return Module(
            name,
            self._part(path),
            ".".join(folders) or name,
            len(text.splitlines()),
            comment_lines(text),
            sum(docstring_lines(n) for n in ast.walk(tree) if isinstance(n, DOCUMENTED)),
            list(functions(tree, name)),
            frozenset(n for n, late in seen if not late),
            frozenset(n for n, late in seen if late),
        )

    def _part(self, path: Path) -> str:
        if path.parts[:2] == ("lab", "reproduce"):
            return "papers"
        if len(path.parts) > 1:
            return path.parts[0] if path.parts[0] in SIDES else "core"
        if (self.package / "theory").is_dir():
            return "core"
        return "vocabulary" if path.stem.startswith("vocabulary_") else FLAT.get(path.stem, "core")

    def _target(self, name: str) -> str:
        """The module that an imported name is in: itself, or the nearest above."""
        while name not in self.modules and name:
            name = name.rpartition(".")[0]
        return name or "__init__"

    def arrows(self, *, rooms: bool, late: bool, parts: Iterable[str] = GROUPS["all"]) -> set[tuple[str, str]]:
        """Pairs (importer, imported) of different modules or rooms of some parts.

        Args:
            rooms: between rooms, not modules.
            late: imports inside functions and for type checkers count too.
            parts: both ends are in one of these.
        """
        found = set()
        for module in self.modules.values():
            for name in module.imports | (module.late if late else frozenset()):
                other = self.modules[self._target(name)]
                if module.part in parts and other.part in parts:
                    found.add((module.room, other.room) if rooms else (module.name, other.name))
        return {(a, b) for a, b in found if a != b}

    def circles(self, *, rooms: bool) -> list[list[str]]:
        """Modules or rooms that import each other, each group once."""
        after: dict[str, set[str]] = defaultdict(set)
        for a, b in self.arrows(rooms=rooms, late=False):
            after[a].add(b)
        reach = {a: _reached(a, after) for a in list(after)}
        groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach if a in reach[a]}
        return sorted(sorted(g) for g in groups)

    def repeated(self, fewest: int) -> list[list[Function]]:
        """Groups of functions with the same list of at least so many parameters."""
        groups: dict[tuple[str, ...], dict[tuple[str, str], Function]] = defaultdict(dict)
        for f in self.functions():
            if len(f.parameters) >= fewest and not f.overload:
                groups[f.parameters].setdefault((f.module, f.name), f)
        return [list(g.values()) for g in groups.values() if len(g) > 1]

    def functions(self, parts: Iterable[str] = GROUPS["all"]) -> list[Function]:
        """Functions of some parts."""
        return [f for m in self.modules.values() if m.part in parts for f in m.functions]

    def lines(self) -> dict[str, int]:
        """Lines of code, docstrings and blanks of each part."""
        count = Counter(dict.fromkeys(GROUPS["all"], 0))
        for module in self.modules.values():
            count[module.part] += module.lines
        return {**count, "lab + papers": count["lab"] + count["papers"], "all": count.total()}


def _reached(start: str, after: Mapping[str, set[str]]) -> set[str]:
    reached, todo = set[str](), [start]
    while todo:
        new = after.get(todo.pop(), set()) - reached
        reached |= new
        todo += new
    return reached
