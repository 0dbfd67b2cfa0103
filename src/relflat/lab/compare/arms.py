"""Arms of a comparison: an algorithm, what is held fixed, and the one value that is searched over.

Every arm searches the same number of values. The values come from the algorithms' own papers and from a pre-study
on Fashion-MNIST, never from the data a comparison is about.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relflat.errors import ConfigError
from relflat.lab.names import look_up

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        name: on the command line and in files.
        title: in tables and figures.
        algorithm: name of the algorithm it trains by.
        key: the value that is searched over.
        values: what is tried for it.
        fixed: other values that differ from the algorithm's defaults.
        origin: where the values come from.
    """

    name: str
    title: str
    algorithm: str
    key: str
    values: tuple[float, ...]
    fixed: Values = field(default_factory=dict)
    origin: str = ""

    @property
    def grid(self) -> list[Values]:
        """The settings to try."""
        return [{**self.fixed, self.key: value} for value in self.values]


RHO = (0.05, 0.1, 0.2, 0.4)
STRENGTH = (0.01, 0.03, 0.1, 0.3)
EVERY_LAYER = "on the input of every weight layer"

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            "plain",
            "plain",
            "plain",
            "weight_decay",
            (5e-4, 2e-3, 8e-3, 3.2e-2),
            origin="the usual weight decay 5e-4, quadrupled three times",
        ),
        Arm(
            "smoothing",
            "label smoothing",
            "smoothing",
            "smoothing",
            (0.05, 0.1, 0.2, 0.4),
            origin="around the usual 0.1, doubled three times",
        ),
        Arm(
            "dropout",
            "dropout",
            "dropout",
            "rate",
            (0.05, 0.1, 0.2, 0.4),
            origin=f"around the 0.1 and 0.33 of the pre-study, doubled three times; {EVERY_LAYER}",
        ),
        Arm(
            "noise",
            "Gaussian noise",
            "noise",
            "sigma",
            (0.1, 0.2, 0.4, 0.8),
            origin=f"up to the deviation of standardised inputs, doubled three times; {EVERY_LAYER}",
        ),
        Arm("sam", "SAM", "sam", "rho", RHO, origin="0.05 of Foret et al. (2021), doubled three times"),
        Arm(
            "asam",
            "ASAM",
            "sam",
            "rho",
            (0.25, 0.5, 1.0, 2.0),
            {"adaptive": True},
            origin="around the 0.5 and 1 of Kwon et al. (2021), doubled three times",
        ),
        Arm(
            "looksam",
            "LookSAM",
            "looksam",
            "alpha",
            (0.7, 0.35, 0.175, 0.0875),
            {"period": 5, "rho": 0.1},
            origin="0.7 of Liu et al. (2022), halved three times; a second pass every 5 steps, its direction kept",
        ),
        Arm(
            "fam",
            "FAM",
            "fam",
            "strength",
            STRENGTH,
            {"gradient": "full"},
            origin="half decades around the 0.1 of Adilova et al. (2023); all of their Lemma 1, output layer",
        ),
        Arm(
            "fam-frozen",
            "FAM frozen",
            "fam",
            "strength",
            STRENGTH,
            {"gradient": "frozen"},
            origin="as FAM, the curvature held constant in the gradient",
        ),
        Arm(
            "fam-weights",
            "FAM weights",
            "fam",
            "strength",
            STRENGTH,
            {"gradient": "weights"},
            origin="as FAM, only the part of the gradient that reaches the layer itself, as in the released code",
        ),
        Arm(
            "fam-all",
            "FAM all layers",
            "fam",
            "strength",
            (0.001, 0.003, 0.01, 0.03),
            {"layer": "*"},
            origin="a decade below FAM, as the kappas of all weight layers add up; Gauss-Newton probes",
        ),
        Arm(
            "fam-one",
            "FAM a layer a step",
            "fam",
            "strength",
            (0.001, 0.003, 0.01, 0.03),
            {"layer": "*", "layers_per_step": 1},
            origin="as FAM all layers; each step draws one of them, its kappa times their number",
        ),
        Arm(
            "fam-radius",
            "FAM radius",
            "fam",
            "radius",
            (0.25, 0.35, 0.5, 0.7),
            {"strength": 1.0, "layer": "*"},
            origin="its square doubled from 1/16 to 1/2, about the range of the pre-study; every weight layer",
        ),
        Arm(
            "fam-sam",
            "FAM + SAM",
            "fam-sam",
            "strength",
            STRENGTH,
            {"rho": 0.1},
            origin="as FAM, under SAM of rho 0.1",
        ),
    )
}


def arms_named(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms with these names, in that order.

    Raises:
        ConfigError: an unknown name (the nearest is named), or one that is given twice.
    """
    found = tuple(look_up("arm", name, ARMS) for name in names)
    twice = sorted({arm.name for arm in found if found.count(arm) > 1})
    if twice:
        raise ConfigError(f"Arms {twice} are named more than once; name each once.")
    return found
