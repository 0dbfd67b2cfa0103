"""Options that mean nothing together are refused."""

import pytest
from small import mlp
from torch import nn

from relflat import FAM, ConfigError

CE = nn.CrossEntropyLoss


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0.1, "gradient": "weights"},
        {"radius": 0.1, "layers_per_step": 1},
        {"radius": 0.1, "method": "closed_form"},
        {"method": "finite_difference", "curvature": "hessian", "gradient": "weights"},
    ],
)
def test_options_without_meaning_are_refused(options) -> None:
    with pytest.raises(ConfigError, match=r"no meaning|full gradient only"):
        FAM(CE(), mlp(), "output", strength=1.0, **options)
