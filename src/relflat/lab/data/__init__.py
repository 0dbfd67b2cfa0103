"""Data sets and how they are fetched, split and batched."""
