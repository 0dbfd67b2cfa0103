"""The rated sentences of Hutto and Gilbert (ICWSM 2014): film reviews, Amazon reviews, news and tweets.

At least twenty people rated each sentence from -4 (extremely negative) to 4; a sentence counts as positive or
negative if the mean is at least half a point from neutral, others are left out. The same sentence, whatever its case
and spacing, is kept once over all four domains, so nothing that is trained on comes back in a test.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from relflat.errors import DataError

ARCHIVE = "hutto_ICWSM_2014.tar.gz"
FILES = {
    "films": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
CLEAR = 0.5  # smallest distance of the mean rating from neutral


@dataclass(frozen=True)
class Sentences:
    """Sentences of one domain as published; their labels are 1 where the mean rating is positive, else 0."""

    texts: list[str]
    labels: list[int]


def sentences(folder: Path) -> dict[str, Sentences]:
    """The four domains, films first, from the folder with the inner archive."""
    seen: set[str] = set()
    found = {domain: Sentences([], []) for domain in FILES}
    for domain, file in FILES.items():
        for number, line in enumerate(read_lines(folder / ARCHIVE, file), 1):
            try:
                _, rating, text = line.split("\t", 2)
                mean = float(rating)
            except ValueError as error:
                raise DataError(f"Line {number} of {file} is not id, rating, text: {line[:80]!r}") from error
            key = " ".join(text.lower().split())
            if abs(mean) >= CLEAR and key not in seen:
                seen.add(key)
                found[domain].texts.append(text)
                found[domain].labels.append(int(mean > 0))
    return found


def read_lines(archive: Path, name: str) -> list[str]:
    """The lines of one file of the archive, which is read without unpacking it."""
    try:
        with tarfile.open(archive) as packed:
            member = next(m for m in packed.getmembers() if Path(m.name).name == name)
            file = packed.extractfile(member)
            assert file is not None
            return file.read().decode("utf-8").splitlines()
    except (OSError, tarfile.TarError, StopIteration) as error:
        raise DataError(
            f"{archive} has no readable {name}: {error!r}. Delete its folder and get 'reviews' again."
        ) from error
