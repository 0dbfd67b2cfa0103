"""Pictures of what was measured: each function draws into ``ax``, or a new figure, and returns the axes.

They need matplotlib (``pip install "relflat[plot]"``), which is imported when something is drawn. Colours can be told
apart by the colour-blind. ``ax.figure.savefig("kappa.svg")`` keeps a picture; in a notebook it shows itself.
"""

from relflat.plot.pictures import history, landscape, layers, samples

__all__ = ["history", "landscape", "layers", "samples"]
