"""Estimators of kappa, and the choice between them."""
