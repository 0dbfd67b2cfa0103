"""The definitions of the papers, dense in float64, and changes of the weights that keep a network's function."""
