"""The documents are true: code runs and prints what is shown, links resolve, commands parse, nothing is missing."""

import inspect
import re
import shlex
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from code_blocks import WHY_NOT_RUN, blocks, same_output
from sklearn.metrics import mean_squared_error, r2_score

import relflat
from fetched import have
from relflat import plot, reference, reparam
from relflat.cli.compare import compare
from relflat.cli.main import COMMANDS, main
from relflat.lab.compare.arms import ARMS
from relflat.lab.data.splits import classification
from relflat.lab.tasks import SGD, Adam, AdamW, Task
from relflat.lab.tasks import task as tasks
from relflat.lab.tasks.metrics import ACCURACY, Metric, evaluate

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
import gallery  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(page for room in ("howto", "api", "gallery") for page in sorted((ROOT / "docs" / room).glob("*.md"))),
]
NEEDS = {"lora.md": "peft", "trl.md": "trl"}  # page -> package
GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.py"))
SECONDS = 20  # of processor time, for one example
HERE = "https://github.com/relflat/relflat/blob/main/"


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _as_found(tmp_path, monkeypatch):
    """Run in an empty folder, and put back what examples may change for the whole process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


# -- code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=_id)
def test_python_blocks_run_and_print_what_is_shown(page, capsys, monkeypatch):
    if page.name in NEEDS:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip(NEEDS[page.name])
    names = {"__name__": "docs"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec")
        exec(code, names)
        printed = capsys.readouterr().out
        if block.printed is not None:
            assert same_output(block.printed, printed), f"{page.name}:{block.line} printed\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_every_block_runs_or_has_a_reason_not_to(page):
    for block in blocks(page):
        assert block.language == "python" or block.language in WHY_NOT_RUN, f"{page.name}:{block.line}"


@pytest.mark.parametrize("example", GALLERY, ids=_id)
def test_example_runs_and_draws_its_figure(example, capsys, tmp_path):
    have(*gallery.NEEDS.get(example.stem, ()))
    start = time.process_time()
    figure = gallery.draw(example, tmp_path)
    assert time.process_time() - start < SECONDS
    assert figure.stat().st_size > 5000
    assert 2 <= len(capsys.readouterr().out.splitlines()) <= 12
    assert 20 <= sum(map(bool, example.read_text().splitlines())) <= 60


def test_the_page_of_the_gallery_is_what_its_programs_say():
    assert len(GALLERY) >= 8
    assert (ROOT / "docs" / "gallery" / "README.md").read_text() == gallery.page()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the source distribution leaves pictures out")
def test_figures_of_the_gallery_are_small():
    figures = {gallery.figure_of(example) for example in GALLERY}
    assert figures == {p for kind in ("svg", "png") for p in (ROOT / "docs" / "gallery").glob(f"*.{kind}")}
    assert max(p.stat().st_size for p in figures) < 60_000


@pytest.mark.parametrize(
    ("documented", "printed", "same"),
    [
        ("kappa 1.00 [exact]", "kappa 1.04 [exact]", True),
        ("kappa 1.00 [exact]", "kappa 1.50 [exact]", False),
        ("kappa 1.00 [exact]", "kappa 1.00 [probe]", False),
        ("kappa 1.00\n", "kappa 1.00\nmore", False),
    ],
)
def test_outputs_are_compared(documented, printed, same):
    assert same_output(documented, printed) is same


# -- links and commands --------------------------------------------------------------------------------------


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted({*PAGES, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")}), ids=_id)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        base = ROOT if target.startswith(HERE) else page.parent  # README's are absolute, for the package index
        target = target.removeprefix(HERE)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not re.search(r"\breport\.(html|json|csv|tex)$", path), f"{page.name} links to {target}, not in git"
        linked = base / path if path else page
        left_out = linked.suffix == ".svg" and not (ROOT / ".git").exists()  # as in the source distribution
        assert linked.exists() or left_out, f"{page.name} links to {target}"
        if anchor:
            text = re.sub(r"^```.*?^```$", "", linked.read_text(), flags=re.MULTILINE | re.DOTALL)
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{page.name} links to {target}"


def _commands() -> list[str]:
    lines = [
        line
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return sorted({line.split("#")[0].removeprefix("$ ").strip() for line in lines} - {""})


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("relflat ")])
def test_command_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--help"])
    assert stop.value.code == 0
    known = capsys.readouterr().out
    for option in re.findall(r"--[a-z-]+", command):
        assert option in known


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("make ")])
def test_make_target_exists(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# -- nothing missing -----------------------------------------------------------------------------------------


def _section(text: str, heading: str) -> str:
    """The text under a heading, up to the next one of the same level."""
    level = heading.split()[0]
    start = text.index(f"\n{heading}\n")
    rest = text[start + len(heading) + 2 :]
    end = re.search(rf"^#{{1,{len(level)}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def _arguments(thing: object) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "args", "kwargs")]


API = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))


def _is_error(name: str) -> bool:
    thing = getattr(relflat, name)
    return isinstance(thing, type) and issubclass(thing, Exception)


@pytest.mark.parametrize("name", relflat.__all__)
def test_every_public_name_has_a_place_on_an_api_page(name):
    assert re.search(rf"^::: relflat\.{name}$", API, re.MULTILINE)
    assert f"`{name}`" in API  # in the index, or in the table of errors


@pytest.mark.parametrize("name", [n for n in relflat.__all__ if not _is_error(n)])
def test_every_argument_is_in_the_docstring_that_the_page_is_made_of(name):
    thing = getattr(relflat, name)
    text = inspect.getdoc(thing)
    known = _arguments(relflat.relative_flatness) if "relative_flatness`" in text else []  # where it refers to that
    missing = [a for a in _arguments(thing) if a not in known and not re.search(rf"\b{a}\b", text)]
    assert missing == []


def test_every_method_of_fam_has_a_docstring():
    own = {n: thing for n, thing in vars(relflat.FAM).items() if not n.startswith("_")}
    assert [n for n, thing in own.items() if not inspect.getdoc(thing)] == []


def _functions(module: object) -> list[str]:
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    ]


@pytest.mark.parametrize("module", [reparam, reference, plot], ids=lambda m: m.__name__)
def test_every_name_of_a_public_module_has_a_place_on_an_api_page(module):
    public = {name: getattr(module, name) for name in module.__all__}
    names = [name for name, thing in public.items() if inspect.isfunction(thing) or inspect.isclass(thing)]
    assert [name for name in names if f"::: {module.__name__}.{name}\n" not in API] == []


def test_how_to_explains_every_key_of_last_and_choice():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "howto").glob("*.md"))
    for word in ("task", "penalty", "total", "kappa", "by_layer", "method", "strength", "skipped"):
        assert f"`{word}`" in text, word
    for word in ("full", "frozen", "weights", "closed_form", "exact", "probe", "finite_difference"):
        assert word in text, word


def test_architecture_names_every_room_and_every_module_of_the_core():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [p for p in (ROOT / "src" / "relflat").iterdir() if p.is_dir() and p.name not in ("__pycache__", "lab")]
    assert [r.name for r in rooms if f"`{r.name}/`" not in text] == []
    core = [
        p
        for r in ("capture", "loss", "curvature", "estimate", "measure")
        for p in (ROOT / "src/relflat" / r).glob("*.py")
    ]
    core += (ROOT / "src" / "relflat").glob("*.py")
    assert [p.name for p in core if not p.stem.startswith("__") and not re.search(rf"\b{p.stem}\b", text)] == []


# -- the rest of the repository -----------------------------------------------------------------------------


def test_no_registry_is_named():
    hosts = re.compile(r"pypi\.org|pythonhosted|registry\.npmjs|anaconda\.org|debian\.org")
    assert [p.name for p in PAGES if hosts.search(p.read_text())] == []


def test_citation_names_both_papers():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == relflat.__version__
    families = [[a["family-names"] for a in r["authors"]] for r in citation["references"]]
    assert families == [
        ["Adilova", "Abourayya", "Li", "Dada", "Petzka", "Egger", "Kleesiek", "Kamp"],
        ["Petzka", "Kamp", "Adilova", "Sminchisescu", "Boley"],
    ]
    for required in ("message", "title", "authors", "type", "license"):
        assert required in citation


def test_changelog_has_this_version():
    assert f"## [{relflat.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_arm_of_a_comparison_has_a_row_with_its_grid():
    section = _section((ROOT / "docs" / "compare.md").read_text(), "## Arms")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    listed = {row[0].strip("`"): row for row in rows if row and row[0].startswith("`")}
    assert list(listed) == list(ARMS)
    for name, (_, _, grid, usual, cost) in listed.items():
        arm, key = ARMS[name], ARMS[name].key.replace("_", " ")
        assert grid == (f"{key} " + ", ".join(f"{value:g}" for value in arm.values) if arm.values else "none"), name
        assert usual == ("the task's" if arm.usual is None else f"{arm.usual:g}"), name
        assert not cost or float(cost) >= 1, name
    default = inspect.signature(compare).parameters["arms"].default
    assert f"The default is `{' '.join(default)}`." in section


OWN_TASK = (ROOT / "docs" / "study" / "own-task.md").read_text()


def _rows(section: str) -> dict[str, list[str]]:
    """The rows of a table by the name in their first cell."""
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_every_field_of_a_task_has_a_row_with_its_default():
    rows = _rows(_section(OWN_TASK, "## Fields of `Task`"))
    assert list(rows) == [field.name for field in fields(Task)]
    for field in fields(Task):
        default = {MISSING: "", ACCURACY: "`ACCURACY`"}.get(field.default, f"`{field.default}`")
        assert rows[field.name][-1] == default, field.name


def test_every_argument_of_classification_has_a_row_with_its_default():
    rows = _rows(_section(OWN_TASK, "## Arguments of `classification`"))
    parameters = inspect.signature(classification).parameters
    assert list(rows) == list(parameters)
    for name, parameter in parameters.items():
        assert rows[name][-1] == ("" if parameter.default is parameter.empty else f"`{parameter.default}`"), name


@pytest.mark.parametrize("record", [SGD, Adam, AdamW])
def test_optimisers_of_a_task_are_given_with_their_settings(record):
    settings = [f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(record)]
    assert f"`{record.__name__}({', '.join(settings)})`" in OWN_TASK


def test_schedules_of_a_task_are_given():
    schedules = [n for n in _functions(tasks) if "steps" in inspect.signature(vars(tasks)[n]).parameters]
    assert len(schedules) == 4
    assert [name for name in schedules if f"`{name}`" not in _section(OWN_TASK, "## Fields of `Task`")] == []


def test_the_metric_of_a_regression_is_r2():
    names = {"torch": torch}
    exec(_section(OWN_TASK, "## Regression").split("```python")[1].split("```")[0], names)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(50, 3, generator=generator), torch.randn(50, 1, generator=generator)
    model = torch.nn.Linear(3, 1)
    metric = Metric("r2", "R²", "1 - R²", names["r2"])
    found = evaluate(metric, model, torch.nn.MSELoss(), zip(inputs.split(20), targets.split(20), strict=True))
    outputs = model(inputs).detach()
    assert found["r2"] == pytest.approx(r2_score(targets, outputs), rel=1e-5)
    assert found["loss"] == pytest.approx(mean_squared_error(targets, outputs), rel=1e-5)


def test_every_command_is_listed():
    page = (ROOT / "docs" / "command-line.md").read_text()
    listed = set(re.findall(r"^\| `relflat (\w+)", page, re.MULTILINE))
    assert listed == {*COMMANDS, "data"}
