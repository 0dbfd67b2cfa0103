"""Draw the gallery: run its programs, and write docs/gallery/README.md from what they say of themselves.

python tools/gallery.py [NAME ...]

A program is a file of docs/gallery that saves one figure, NAME.svg or NAME.png, in the folder it runs in. Its
docstring is its entry: a title, and two sentences. Figures get the look of `relflat.plot`, and the same numbers give
the same file.
"""

import ast
import contextlib
import io
import os
import runpy
import sys
import time
from pathlib import Path

import matplotlib

from relflat.plot.style import COLOURS, STYLE

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
HEAD = """# Gallery

Complete, short programs on real data: `python docs/gallery/NAME.py` prints a few lines and saves its figure where
you are, in seconds on one core. They need `pip install "relflat[lab]"`, and two of them what `relflat
data` fetches. `make gallery` draws them all and writes this page.
"""
ENTRY = """
## {title}

[![{title}]({figure})]({name}.py)

{text}{needs} [{name}.py]({name}.py)
"""
NEEDS = {"samples": ("fashion-mnist",), "pretrained": ("minilm", "reviews")}
"""What `relflat data get` has to fetch for a program."""


def programs() -> list[Path]:
    """Those of the gallery, in the order of its page."""
    return sorted(GALLERY.glob("*.py"), key=lambda program: (program.stem != "plain_loop", program.stem))


def draw(program: Path, folder: Path) -> Path:
    """Run a program in a folder; the figure it has saved there."""
    look = STYLE | {"axes.prop_cycle": matplotlib.cycler(color=[COLOURS[k] for k in (2, 1, 3, 4, 5, 0)])}
    look |= {"svg.hashsalt": program.stem, "text.parse_math": True, "axes.titlesize": "medium"}
    with matplotlib.rc_context(look), contextlib.chdir(folder):
        matplotlib.use("agg")
        runpy.run_path(str(program), run_name="__main__")
        matplotlib.pyplot.close("all")
    return figure_of(program, folder)


def figure_of(program: Path, folder: Path = GALLERY) -> Path:
    """The figure of a program in a folder."""
    return next(folder.glob(f"{program.stem}.[ps][nv]g"))


def entry(program: Path) -> str:
    """A program's part of the page."""
    # title, empty line, two sentences
    title, _, text = (ast.get_docstring(ast.parse(program.read_text("utf-8"))) or "").partition("\n\n")
    fetched = NEEDS.get(program.stem, ())
    needs = f" `relflat data get {' '.join(fetched)}` first." if fetched else ""
    return ENTRY.format(
        title=title.rstrip("."),
        name=program.stem,
        figure=figure_of(program).name,
        text=" ".join(text.split()),
        needs=needs,
    )


def page() -> str:
    """The text of docs/gallery/README.md."""
    return HEAD + "".join(map(entry, programs()))


def main(*names: str) -> None:
    """Draw the programs of these names, or all, and write the page."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # no date in figures
    for program in programs():
        if not names or program.stem in names:
            start, printed = time.process_time(), io.StringIO()
            with contextlib.redirect_stdout(printed):
                size = draw(program, GALLERY).stat().st_size
            print(f"{program.stem}: {time.process_time() - start:.1f} s of a processor, {size // 1000} kB")
            print("    " + printed.getvalue().strip().replace("\n", "\n    "), flush=True)
    (GALLERY / "README.md").write_text(page(), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
