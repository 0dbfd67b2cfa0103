"""Data sets, how they are fetched, split and batched."""

from relflat.lab.data.arrays import Arrays, RawData
from relflat.lab.data.fetch import read
from relflat.lab.data.splits import Splits, classification

__all__ = ["Arrays", "RawData", "Splits", "classification", "read"]
