"""Published architectures in small configurations, held against double backward: which layers, and their kappas.

Those of timm, torchvision and segmentation-models-pytorch run where these are installed: ``make test-architectures``.
"""

import importlib.util

import comparisons
import pytest
from published import Published
from published_diffusers import DIFFUSERS
from published_graphs import GRAPHS
from published_language import LANGUAGE
from published_pictures import SMP, TIMM, TORCHVISION
from published_sequences import SEQUENCES
from published_vision import VISION

CASES = [*LANGUAGE, *SEQUENCES, *VISION, *DIFFUSERS, *GRAPHS, *TIMM, *TORCHVISION, *SMP]

EVERY = importlib.util.find_spec("timm") is not None  # the environment in which minutes may pass
LONG = (  # left to it
    "AutoencoderKL", "ConvNextV2ForImageClassification", "FluxTransformer2DModel", "RegNetForImageClassification",
    "RwkvForCausalLM", "SegformerForSemanticSegmentation", "SwitchTransformersForConditionalGeneration",
    "UNet2DConditionModel", "UNet2DModel",
)  # fmt: skip


def installed(case: Published) -> bool:
    there = importlib.util.find_spec(case.library.replace("-", "_")) is not None
    return there and (EVERY or case.name not in LONG)


def _parameters() -> list:
    named = {f"{case.library}:{case.name}": case for case in CASES if installed(case)}
    return [pytest.param(case, id=name, marks=pytest.mark.xdist_group(name)) for name, case in named.items()]


@pytest.fixture(params=_parameters())
def case(request: pytest.FixtureRequest) -> Published:
    return request.param


def test_there_are_more_than_sixty():
    assert len({(case.library, case.name) for case in CASES}) == len(CASES) > 60


def test_double_backward_is_that_of_differences(case: Published) -> None:
    comparisons.check_oracle(case)


def test_output_is_the_layer_that_the_loss_was_computed_from(case: Published) -> None:
    comparisons.check_output(case)


def test_a_hidden_layer(case: Published) -> None:
    comparisons.check_hidden(case)


def test_star_is_every_weight_matrix_once(case: Published) -> None:
    comparisons.check_star(case, every=EVERY)


def test_a_training_step(case: Published) -> None:
    comparisons.check_step(case)


def test_training_with_nothing_chosen(case: Published) -> None:
    comparisons.check_default(case)
