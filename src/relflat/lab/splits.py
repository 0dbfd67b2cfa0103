"""Cutting data into splits, by its documented path; it is in `relflat.lab.data.splits`."""

from relflat.lab.data.splits import Splits, classification

__all__ = ["Splits", "classification"]
