"""Kappa over a data set."""
