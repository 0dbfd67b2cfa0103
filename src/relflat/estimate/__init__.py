"""Estimators of kappa, and the choice between them: from a scene to contributions by layer."""
