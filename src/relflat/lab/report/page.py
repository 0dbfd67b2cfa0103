"""The page around a report: a table, a style sheet for light and dark mode, and the document."""

import html
from collections.abc import Sequence

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c1e21; --quiet: #5b626b; --lines: #c9ced4; --box: #f3f5f7;
  --c0: #5b6570; --c1: #d2610a; --c2: #0f73c4; --c3: #23863a; --c4: #8a3fb5; --c5: #c2255c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e6e8eb; --quiet: #a2a9b2; --lines: #454b53; --box: #1f2327;
    --c0: #aab3bd; --c1: #ff9d4d; --c2: #5eb3ff; --c3: #6fd08a; --c4: #cf9bff; --c5: #ff86b3;
  }
}
body {
  margin: 0 auto; max-width: 84rem; padding: 1rem 1rem 3rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 1.6rem 0 .5rem; }
.lead, .small { max-width: 46rem; }
.small, figcaption { color: var(--quiet); font-size: .875rem; }
.verdict {
  background: var(--box); border-left: 4px solid var(--c2); border-radius: 4px; padding: .6rem 1rem;
}
.verdict h2 { margin: 0; }
.verdict ul { margin: .4rem 0; padding-left: 1.1rem; }
.scroll {  /* a shadow at the side where more is hidden; the first two layers cover it at the ends */
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--paper) 40%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--lines), transparent) left / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--lines), transparent) right / .8rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td {
  border-bottom: 1px solid var(--lines); padding: .35rem .8rem .35rem 0; text-align: left;
  vertical-align: top; white-space: nowrap;
}
th { white-space: normal; vertical-align: bottom; color: var(--quiet); font-weight: 600; }
td:last-child { min-width: 15rem; white-space: normal; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) {
  td:first-child { min-width: 6rem; max-width: 8rem; white-space: normal; }
  td:last-child { min-width: 11rem; }
}
.figures {
  display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
}
figure { margin: 0; max-width: 34rem; }
figure svg { display: block; height: auto; width: 100%; }
svg text { font-family: system-ui, sans-serif !important; }
"""


def table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways by itself on a small screen."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in body
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


def page(title: str, body: str) -> str:
    """Wrap the body into a whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE_SHEET}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
