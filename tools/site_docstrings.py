"""Docstrings on the site: their roles become links where the name has a place on an API page, else code."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
CODE = re.compile(r"``([^`]+)``")
SPACES = ("", "relflat.", "relflat.reparam.", "relflat.reference.", "relflat.plot.", "relflat.FAM.")
LIKE = re.compile(r"_arguments_of\((\w+)\)")


@cache
def shown() -> frozenset[str]:
    """The names that an API page shows: those it asks for, and the methods of FAM."""
    pages = "\n".join(page.read_text("utf-8") for page in Path("docs/api").glob("*.md"))
    methods = re.findall(r"^    def ([a-z]\w*)", Path("src/relflat/fam.py").read_text("utf-8"), re.MULTILINE)
    return frozenset(re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)) | {f"relflat.FAM.{name}" for name in methods}


def as_markdown(text: str) -> str:
    """Roles as cross-references, double backticks as single ones, doctests as examples."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        full = next((space + name for space in SPACES if space + name in shown()), None)
        return f"[`{name.removeprefix('relflat.')}`][{full}]" if full else f"`{name}`"

    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return CODE.sub(r"`\1`", ROLE.sub(link, text))


class Docstrings(Extension):
    """Rewrites every docstring once it is loaded, and gives a function the arguments that a decorator gives it."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
        for decorator in obj.decorators if obj.is_function else ():
            if match := LIKE.search(str(decorator.value)):
                obj.parameters = obj.parent.members[match[1]].parameters
