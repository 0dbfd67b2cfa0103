"""Hooks of the site (mkdocs.yml): pages for files outside docs/, and links that lead to them.

Documents link to programs, results and the changelog by relative paths, as GitHub has it. On the site a Markdown file
of the repository's root is a page of its own, a program or a settings file a page that shows it, and anything else
is copied.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

LINK = re.compile(r"(?<=\]\()(?!#|[a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
HOME = {"README.md": "index.md", "docs/README.md": "index.md"}  # where the index of GitHub leads
SHOWN = {".py": "python", ".toml": "toml", ".cff": "yaml", "": "text"}


def _origin(src_uri: str) -> str:
    """Path in the repository of a page of the site."""
    return src_uri if os.path.exists(src_uri) and "/" not in src_uri else f"docs/{src_uri}"


def _place(path: str) -> str:
    """Path on the site of a file of the repository."""
    if path in HOME:
        return HOME[path]
    kind = posixpath.splitext(path)[1]
    if path.startswith("docs/") and kind != ".py":
        return path.removeprefix("docs/")
    if kind == ".md":
        return path
    return f"files/{path}.md" if kind in SHOWN else f"files/{path}"


def _links(text: str, origin: str) -> Iterator[str]:
    for part in FENCE.split(text)[::2]:
        for match in LINK.finditer(part):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _as_page(path: str) -> str:
    """A file of the repository as it is, or a program inside a page that shows it."""
    text, (_, kind) = _read(path), posixpath.splitext(path)
    if kind not in SHOWN:
        return text
    title = posixpath.basename(path)
    return f"---\ntitle: {title}\n---\n\n# {title}\n\n`{path}`\n\n````{SHOWN[kind]}\n{text.rstrip()}\n````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file outside the site's own that the documents lead to."""
    from mkdocs.structure.files import File

    waiting = [_origin(f.src_uri) for f in files.documentation_pages()] + ["CHANGELOG.md", "CONTRIBUTING.md"]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not os.path.isfile(path):
            continue  # a link that leads nowhere is reported by the build
        seen.add(path)
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), content=_as_page(path)))
        if path.endswith(".md") and path not in HOME:
            waiting += _links(_read(path), path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the places that files of the repository have on the site."""
    origin, here = _origin(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def there(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        if not os.path.isfile(path):
            return match[0]
        anchor = "" if path in HOME else match[2] or ""
        return posixpath.relpath(_place(path), here or ".") + anchor

    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would list nothing but itself
    if page.file.src_uri.startswith("files/"):
        return markdown
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(there, part) for part in parts[::2]]
    return "".join(parts)
