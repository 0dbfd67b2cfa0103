"""Operators and the spaces they act in."""
