"""Which small changes to the modules that choose, capture and estimate do the tests notice? A random sample of them.

The changes are cosmic-ray's; sites are drawn alike, then one change at each, as many in a module as it has sites of
all. The tests of a change are those that ran its line, by the contexts of a coverage run; a process that has loaded
torch forks for each change, so that one costs seconds, and nothing is written to the sources. A test that says no
must say yes to the unchanged sources in such a process, or it does not count. What changes nothing that can be seen
is not drawn: ``is`` for ``==`` and back, ``strict=`` of zip, the arguments of ``dataclass``.

python -m pytest tests/unit ... --cov --cov-context=test --durations=0 --durations-min=0 -vv > durations.txt
python tools/mutants.py --durations durations.txt --seed 2 --count 150 --out mutants.jsonl
python tools/mutants.py --out mutants.jsonl --count 0       what was found so far
"""

import argparse
import ast
import difflib
import functools
import gc
import importlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from itertools import accumulate, chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "relflat"
MODULES = ("options.py", "guards.py", "sizing.py", "capture/*.py", "estimate/*.py", "curvature/*.py", "loss/*.py")
FIRST, SECONDS, MOST = 30, 20.0, 200.0  # tests tried at first; their seconds; those of all that are tried
SLOWER = 6  # times as much processor time as the tests took: endless; ten times that by the clock: stuck
PYTEST = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "xdist"]
SAME = ("Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq")  # comparisons of constants and singletons
_NOT_FOUND = 4  # what pytest ends with
Site = tuple[Path, tuple[int, int], list[tuple[str, int]]]


def is_type(node: ast.AST) -> bool:
    """Whether a statement at the top gives a name to a type, as far as its form tells."""
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp | ast.Subscript)


def annotations(tree: ast.Module) -> Iterator[ast.AST]:
    """What is there for type checkers and readers only."""
    yield from (node for node in tree.body if is_type(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (d for d in node.decorator_list if isinstance(d, ast.Call))
        if isinstance(node, ast.keyword) and node.arg == "strict":
            yield node
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                yield getattr(node, name)


def sites(path: Path) -> list[Site]:
    """The places of a module where something can be changed, each with its changes."""
    nodes, found = list(ast_nodes(get_ast_from_path(path))), defaultdict(list)
    for name in operator_names():
        if not get_operator(name).arguments() and not name.endswith(SAME):
            positions = [p for node in nodes for p in get_operator(name)().mutation_positions(node)]
            for occurrence, (start, _) in enumerate(positions):
                found[start].append((name, occurrence))
    types = [((a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)) for a in annotations(parsed(path))]
    return [(path, at, made) for at, made in sorted(found.items()) if not any(a <= at < b for a, b in types)]


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(path.read_text())


def sample(count: int, seed: int) -> list[dict[str, Any]]:
    """Changes drawn at random, proportionally from all modules."""
    rng, modules = random.Random(seed), [sites(p) for pattern in MODULES for p in sorted(SOURCE.glob(pattern))]
    total, taken, passed, drawn = sum(map(len, modules)), 0, 0, []
    for module in modules:
        passed += len(module)
        upto = round(count * passed / total)
        for path, (line, column), made in rng.sample(module, min(len(module), upto - taken)):
            operator, occurrence = rng.choice(made)
            name = str(path.relative_to(SOURCE))
            drawn.append({"module": name, "line": line, "column": column, "change": operator.split("/")[1]})
            drawn[-1] |= {"operator": operator, "occurrence": occurrence}
        taken = upto
    rng.shuffle(drawn)
    return drawn


def spans(tree: ast.Module, line: int) -> Iterator[range]:
    """The lines of a line's statement, function and class, from the inside out, without nested headers."""
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or 0)]
    yield range(line, line + 1)
    for node in sorted(around, key=lambda n: (n.end_lineno or 0) - n.lineno):
        yield range(node.lineno, (node.end_lineno or 0) + 1)
    yield range(1, 10_000)


class Tests:
    """Which tests ran a line, and how long they take."""

    def __init__(self, coverage: Path, durations: Sequence[Path]) -> None:
        self.data = CoverageData(str(coverage))
        self.data.read()
        self.ran = functools.cache(self._ran)
        self.seconds: dict[str, float] = defaultdict(float)
        for text in durations:
            for s, test in re.findall(
                r"^([\d.]+)s (?:setup|call) +(.*?)(?:@[\w-]+)?$", text.read_text(), re.MULTILINE
            ):
                self.seconds[test] += float(s)

    def _ran(self, path: Path) -> dict[int, set[str]]:
        contexts = self.data.contexts_by_lineno(str(path))
        return {n: {re.sub(r"(@[\w-]+)?\|\w+$", "", c) for c in names if c} for n, names in contexts.items()}

    def of(self, path: Path, line: int) -> list[str]:
        """Tests of a line, or of what is around it where it runs on import.

        By turns one of least reach, files in turn, and one at random: some lines are what a test is about, others
        are run by thousands, any of which would notice.
        """
        for span in spans(parsed(path), line):
            ran = {test for n, tests in self.ran(path).items() if n in span for test in tests}
            by_file = defaultdict(list)
            for test in sorted(ran & self.seconds.keys(), key=lambda t: (self.reach[t], t)):
                by_file[test.split("::")[0]].append(test)
            if by_file:
                turns = sorted((k, self.reach[t], t) for tests in by_file.values() for k, t in enumerate(tests))
                names = [t for *_, t in turns]
                others = random.Random(line).sample(names, len(names))
                return list(dict.fromkeys(chain.from_iterable(zip(names, others, strict=True))))
        return []

    @functools.cached_property
    def reach(self) -> Counter[str]:
        """How many lines each test runs: of few, each is what it is about."""
        files = [Path(name) for name in self.data.measured_files()]
        return Counter(t for path in files for tests in self.ran(path).values() for t in tests)


def attempt(path: Path, source: str, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """What comes of tests of so many seconds with a module changed, in a process of its own; and what noticed."""
    limit = 30 + round(SLOWER * seconds)
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            signal.alarm(10 * limit)
            resource.setrlimit(resource.RLIMIT_CPU, (limit + int(time.process_time()), resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
            pretend(path, source)
            os._exit(int(importlib.import_module("pytest").main([*PYTEST, *tests])))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()
    why = re.findall(r"^(?:FAILED|ERROR|ERROR: not found:) (.*)$", text, re.MULTILINE)
    came = {0: "survived", _NOT_FOUND: "not found"}.get(status, "endless" if status < 0 else "killed")
    return came, (why or [text[-200:]])[-1][:300]


@functools.cache
def passes(test: str) -> bool:
    """Whether a test passes in such a process on the sources as they are."""
    return attempt(SOURCE / "options.py", (SOURCE / "options.py").read_text(), [test], 60.0)[0] == "survived"


def noticed(path: Path, source: str, tests: Sequence[str], seconds: dict[str, float]) -> tuple[str, str]:
    """As :func:`attempt`, without the word of tests that are not there, or fail on the unchanged sources too."""
    while True:
        came, by = attempt(path, source, tests, sum(map(seconds.__getitem__, tests)))
        test = by.split(" - ")[0].removeprefix(f"{ROOT}/")
        if came == "not found":
            tests = [t for t in tests if not t.startswith(test.split("[")[0])]
        elif came != "killed" or test not in tests or passes(test):
            return came, by
        tests = [t for t in tests if t != test]


def pretend(path: Path, source: str) -> None:
    """Have a module be made from another source."""
    get_code = SourceFileLoader.get_code

    def changed(loader: SourceFileLoader, name: str) -> Any:
        return compile(source, loader.path, "exec") if loader.path == str(path) else get_code(loader, name)

    SourceFileLoader.get_code = changed


def tried(change: dict[str, Any], tests: Sequence[str], seconds: dict[str, float]) -> dict[str, Any]:
    """A change with what came of it: quick tests of its line first, more only if those pass."""
    path = SOURCE / change["module"]
    before = path.read_text()
    after = mutate_code(before, get_operator(change["operator"])(), change["occurrence"])
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    change["diff"] = [d for d in diff if d[0] in "+-" and d[:3] not in ("+++", "---")]
    until = list(accumulate(map(seconds.__getitem__, tests)))
    first = [t for t, s in zip(tests[:FIRST], until, strict=False) if s < SECONDS] or tests[:1]
    rest = [t for t, s in zip(tests, until, strict=True) if s < MOST][len(first) :]
    change["came"], change["by"] = noticed(path, after, first, seconds) if tests else ("survived", "no test runs it")
    if change["came"] == "survived" and rest:
        change["came"], change["by"] = noticed(path, after, rest, seconds)
    change["tried"] = len(first) + len(rest)
    return change | {"tests": len(tests)}


def load() -> None:
    """Import what tests import besides the library, once for all changes."""
    for name in (
        "torch._dynamo",
        "pytest",
        "hypothesis.strategies",
        "jaxtyping",
        "torch.testing",
        "torch.distributed",
    ):
        importlib.import_module(name)
    sys.dont_write_bytecode = True
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()  # nothing of this is looked through again in what is forked


def report(found: Sequence[dict[str, Any]]) -> None:
    """Counts by module, the share that was noticed with its 95 % interval (Wilson), and what was not."""
    print("| module | changes | noticed | not | share | 95 % |\n|---|--:|--:|--:|--:|---|")
    names = sorted({f["module"] for f in found})
    for name in [*names, "all"]:
        mine = [f for f in found if name in ("all", f["module"])]
        left = sum(f["came"] == "survived" for f in mine)
        low, high = binomtest(len(mine) - left, len(mine)).proportion_ci(method="wilson")
        counts = f"{len(mine)} | {len(mine) - left} | {left} | {1 - left / len(mine):.0%}"
        print(f"| {name} | {counts} | {low:.0%} to {high:.0%} |")
    for f in sorted((f for f in found if f["came"] == "survived"), key=lambda f: (f["module"], f["line"])):
        print(
            f"\n{f['module']}:{f['line']}:{f['column']} {f['change']} ({f['tests']} tests)", *f["diff"], sep="\n    "
        )


def main() -> None:
    """Try the changes that were not tried yet, and say what is known of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--durations", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "mutants.jsonl")
    args = parser.parse_args()
    os.chdir(ROOT)
    found = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(f["module"], f["operator"], f["occurrence"]) for f in found}
    new = [c for c in sample(args.count, args.seed) if (c["module"], c["operator"], c["occurrence"]) not in known]
    if new:
        tests = Tests(args.coverage, args.durations)
        with ProcessPoolExecutor(args.jobs, get_context("fork"), load) as pool, args.out.open("a") as out:
            chosen = [(c, tests.of(SOURCE / c["module"], c["line"])) for c in new]
            waiting = [pool.submit(tried, c, names, dict(tests.seconds)) for c, names in chosen]
            for one in as_completed(waiting):
                found.append(one.result())
                print(json.dumps(found[-1]), file=out, flush=True)
    report(found)


if __name__ == "__main__":
    main()
