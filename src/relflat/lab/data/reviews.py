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
    """Sentences of one domain.

    Attributes:
        texts: as published.
        labels: 1 where the mean rating is positive, 0 where it is negative.
    """

    texts: list[str]
    labels: list[int]


def sentences(folder: Path) -> dict[str, Sentences]:
    """Read the four domains, films first.

    Args:
        folder: with the inner archive.

    Raises:
        DataError: the archive or a file of it is missing or damaged.
    """
    seen: set[str] = set()
    return {
        domain: distinct(rated(read_lines(folder / ARCHIVE, file), file), seen)
        for domain, file in FILES.items()
    }


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


def rated(lines: list[str], file: str) -> list[tuple[str, float]]:
    """Sentences with a mean rating that is clear of neutral, in their order; a line is id, mean and text."""
    found = []
    for number, line in enumerate(lines, 1):
        parts = line.split("\t", 2)
        try:
            mean, text = float(parts[1]), parts[2]
        except (IndexError, ValueError) as error:
            raise DataError(f"Line {number} of {file} is not id, rating, text: {line[:80]!r}") from error
        if abs(mean) >= CLEAR:
            found.append((text, mean))
    return found


def distinct(rows: list[tuple[str, float]], seen: set[str]) -> Sentences:
    """Each sentence once, the first time; ``seen`` holds those of earlier domains and is added to."""
    texts, labels = [], []
    for text, mean in rows:
        key = " ".join(text.lower().split())
        if key not in seen:
            seen.add(key)
            texts.append(text)
            labels.append(int(mean > 0))
    return Sentences(texts, labels)
