"""The definitions, dense, and the reparametrisations that keep the function."""
