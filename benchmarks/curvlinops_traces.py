"""The Gauss-Newton operator and trace estimators of curvlinops on the problem of ``estimators.py``.

curvlinops brings backpack and more along, so it has an environment of its own:

    python3.11 -m venv /tmp/rivals
    /tmp/rivals/bin/pip install -c constraints.txt '.[lab]' curvlinops-for-pytorch pyhessian
    /tmp/rivals/bin/python benchmarks/estimators.py
"""

import torch
from curvlinops import GGNLinearOperator, hutchpp_trace, xtrace
from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor, nn


class KappaOperator(PyTorchLinearOperator):
    """``R -> W' G[W R]`` on R of shape (m, m), whose trace is kappa; G is their Gauss-Newton matrix of the layer."""

    SELF_ADJOINT = True

    def __init__(self, model: nn.Module, loss: nn.Module, layer: str, data: tuple[Tensor, Tensor]) -> None:
        parameter = model.get_submodule(layer).weight
        assert isinstance(parameter, nn.Parameter)
        self._gauss_newton = GGNLinearOperator(model, loss, [parameter], [data], check_deterministic=False)
        self._shape, self._weight = parameter.shape, parameter.detach().flatten(1)
        m = self._weight.shape[1]
        super().__init__([(m, m)], [(m, m)])

    def _matmat(self, tensors: list[Tensor]) -> list[Tensor]:
        (r,) = tensors
        direction = torch.einsum("dm,mnk->dnk", self._weight, r)
        (pulled,) = self._gauss_newton @ [direction.reshape(*self._shape, -1)]
        return [torch.einsum("dm,dnk->mnk", self._weight, pulled.reshape(*self._weight.shape, -1))]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._weight.dtype

    def xtrace(self, products: int, seed: int) -> float:
        """Their XTrace; its random numbers are the global ones."""
        torch.manual_seed(seed)
        return float(xtrace(self, products))

    def hutch_plus_plus(self, products: int, seed: int) -> float:
        """Their Hutch++."""
        torch.manual_seed(seed)
        return float(hutchpp_trace(self, products))
