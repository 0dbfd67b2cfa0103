"""Any callable is a loss: values and gradients of kappa for two dozen of them against Definition 3."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import Dense
from torch import Tensor, nn

from relflat import GraphError, LossError, per_sample_flatness, reference, relative_flatness
from unbounded import FAM

N, IN, HIDDEN = 6, 4, 3
CE = nn.CrossEntropyLoss
pytestmark = pytest.mark.slow


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0, 2])


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(N, *shape, dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """A loss of outputs with ``width`` columns."""

    fn: Callable[..., Tensor]
    y: Callable[[], Tensor] = classes
    width: int = 3
    kwargs: Callable[[], dict[str, Any]] = dict


def focal(z: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def dice(z: Tensor, mask: Tensor, *, whole_batch: bool = False) -> Tensor:
    """Soft Dice of foreground probabilities, of each sample or of the batch as one volume."""
    p, over = z.sigmoid(), (0, 1) if whole_batch else (1,)
    overlap = 2 * (p * mask).sum(over) + 1e-5
    return (1 - overlap / (p.sum(over) + mask.sum(over) + 1e-5)).mean()


def monai_dice(*, classes: bool = False, **options: Any) -> Callable[..., Tensor]:
    """Dice loss of MONAI: outputs are voxels of one foreground map, or of a map for each of two classes."""

    @functools.cache
    def loss() -> nn.Module:
        from monai.losses.dice import DiceLoss  # slow to import

        return DiceLoss(**({"softmax": True, "to_onehot_y": True} if classes else {"sigmoid": True}), **options)

    def of_maps(z: Tensor, mask: Tensor) -> Tensor:
        maps = z.unflatten(1, (2, 2)) if classes else z[:, None]
        return loss()(maps, (mask[:, None, :2] if classes else mask[:, None]))

    return of_maps


def masks() -> Tensor:
    return (torch.rand(N, 4) > 0.5).double()


def gaussian_nll(z: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z[:, :2], y, F.softplus(z[:, 2:]) + 0.1)


def kl(z: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean")


def cosine(z: Tensor, y: Tensor) -> Tensor:
    return F.cosine_embedding_loss(z[:, :2], z[:, 2:], torch.where(y > 0, 1.0, -1.0), margin=-1.0)


def triplet(z: Tensor, y: Tensor) -> Tensor:
    return F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0), margin=5.0)


def info_nce(z: Tensor, y: Tensor) -> Tensor:
    """Rows 2 i and 2 i + 1 are two views of one thing, all others are negatives."""
    unit = F.normalize(z, dim=1)
    scores = (unit @ unit.T / 0.5).masked_fill(torch.eye(N, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.arange(N).bitwise_xor(1))


def neighbours(z: Tensor, y: Tensor) -> Tensor:
    """Pairs of neighbouring rows alone are coupled."""
    return (z[0::2] * z[1::2]).sum(1).exp().mean()


def several_terms(z: Tensor, y: Tensor) -> Tensor:
    return (
        F.cross_entropy(z, y) + 0.3 * focal(z, y) + 0.01 * z.square().mean() - 0.1 * z.softmax(1).mean(0).log().sum()
    )


def weighted(z: Tensor, y: Tensor, *, scale: float, offset: Tensor) -> Tensor:
    return scale * F.cross_entropy(z + offset, y)


class Centres(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.centres = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        squared = (z[:, None] - self.centres).square().sum(-1)
        return F.cross_entropy(-squared * self.log_scale.exp(), y)


LOSSES = {
    "cross-entropy mean": Loss(CE()),
    "cross-entropy sum": Loss(CE(reduction="sum")),
    "label smoothing": Loss(CE(label_smoothing=0.2)),
    "class weights": Loss(CE(weight=torch.tensor([1.0, 2.0, 0.5]).double())),
    "soft labels": Loss(CE(), lambda: torch.randn(N, 3).double().softmax(1)),
    "nll of log softmax": Loss(lambda z, y: F.nll_loss(z.log_softmax(1), y)),
    "multi label": Loss(nn.MultiLabelSoftMarginLoss(), lambda: (torch.rand(N, 3) > 0.5).double()),
    "bce": Loss(nn.BCEWithLogitsLoss(), numbers(3)),
    "mse": Loss(nn.MSELoss(), numbers(3)),
    "huber": Loss(nn.HuberLoss(delta=0.3), numbers(3)),
    "smooth l1": Loss(nn.SmoothL1Loss(beta=0.7), numbers(3)),
    "log cosh": Loss(lambda z, y: (z - y).cosh().log().mean(), numbers(3)),
    "poisson": Loss(nn.PoissonNLLLoss(), numbers(3)),
    "poisson of a rate": Loss(lambda z, y: F.poisson_nll_loss(F.softplus(z), y, log_input=False), numbers(3)),
    "gaussian nll": Loss(gaussian_nll, numbers(2)),
    "focal": Loss(focal),
    "kl": Loss(kl, numbers(3)),
    "dice": Loss(dice, lambda: (torch.rand(N, 4) > 0.5).double(), width=4),
    "dice of the batch": Loss(
        lambda z, y: dice(z, y, whole_batch=True), lambda: (torch.rand(N, 4) > 0.5).double(), width=4
    ),
    "dice of monai": Loss(monai_dice(), masks, width=4),
    "dice of monai, sum": Loss(monai_dice(reduction="sum", jaccard=True), masks, width=4),
    "dice of monai, squared": Loss(monai_dice(squared_pred=True), masks, width=4),
    "dice of monai, classes": Loss(monai_dice(classes=True, include_background=False), masks, width=4),
    "dice of monai, of the batch": Loss(monai_dice(batch=True), masks, width=4),
    "cosine embedding": Loss(cosine, width=4),
    "triplet": Loss(triplet),
    "info nce": Loss(info_nce),
    "pairs of neighbours": Loss(neighbours),
    "several terms": Loss(several_terms),
    "keywords": Loss(weighted, kwargs=lambda: {"scale": 0.7, "offset": torch.ones(3, dtype=torch.float64)}),
    "parameters of its own": Loss(Centres()),
    "not convex": Loss(lambda z, y: (z.sin() * z.roll(1, 1)).sum(1).mean()),
}
COUPLED = {
    "dice of the batch",
    "dice of monai, of the batch",
    "triplet",
    "info nce",
    "pairs of neighbours",
    "several terms",
}
MONAI = pytest.mark.xdist_group("monai")  # takes 15 s to import
NAMES = [pytest.param(name, marks=MONAI) if "monai" in name else name for name in LOSSES]


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, width)).double()


def inputs() -> Tensor:
    return torch.randn(N, IN, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name: str, layer: str) -> None:
    case = LOSSES[name]
    model, x, y, kwargs = network(case.width), inputs(), case.y(), case.kwargs()
    own = list(case.fn.parameters()) if isinstance(case.fn, nn.Module) else []
    dense = Dense(network(case.width), layer, lambda m: m(x))
    want = dense.kappa(lambda z: case.fn(z, y, **kwargs))
    gradients = torch.autograd.grad(want, [*dense.model.parameters(), *own], materialize_grads=True)
    with FAM(case.fn, model, layer, strength=1.0, curvature="hessian", method="exact") as fam:
        z = model(x)
        added = fam(z, y, **kwargs) - case.fn(z, y, **kwargs)
        got = torch.autograd.grad(added, [*model.parameters(), *own], materialize_grads=True)
        assert float(added) == pytest.approx(want.item(), rel=1e-9, abs=1e-9)
        for a, b in zip(got, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        loss = case.fn(model(x), y, **kwargs)
        assert float(fam.penalty(2.5 * loss)) == pytest.approx(2.5 * want.item(), rel=1e-9, abs=1e-9)


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "keywords"])
def test_measured_and_sampled(name: str, layer: str) -> None:
    case = LOSSES[name]
    model, x, y = network(case.width), inputs(), case.y()
    dense = Dense(network(case.width), layer, lambda m: m(x))
    want = dense.kappa(lambda z: case.fn(z, y)).item()
    options: dict[str, Any] = {"layer": layer, "method": "exact"}
    assert relative_flatness(model, case.fn, (x, y), **options).value == pytest.approx(want, rel=1e-9, abs=1e-9)
    ggn = dense.kappa_ggn(lambda z: case.fn(z, y)).item()
    flat = relative_flatness(model, case.fn, (x, y), curvature="ggn", **options)
    assert flat.value == pytest.approx(ggn, rel=1e-9, abs=1e-9)
    # probes of one curvature at one layer, of the other at the other, and the other way about for the next loss
    curvature, want = (("hessian", want), ("ggn", ggn))[(list(LOSSES).index(name) + (layer == "2")) % 2]
    options = {"layer": layer, "method": "probe", "curvature": curvature, "probes": 300}
    flat = relative_flatness(model, case.fn, (x, y), **options)
    assert abs(flat.value - want) <= 4 * flat.stderr + 1e-9


@pytest.mark.filterwarnings("ignore:kappa of layer")
@pytest.mark.parametrize("layer", ["0", "2"])
def test_one_loss_a_sample(layer: str) -> None:
    """Each sample's share is kappa of its own loss."""
    model, x, y = network(3), inputs(), classes()
    each = lambda z, t: F.cross_entropy(z, t, reduction="none") + z.square().sum(1)
    with FAM(each, model, layer, strength=1.0, curvature="hessian", method="exact") as fam:
        z = model(x)
        shares = fam(z, y) - each(z, y)
    for i in range(N):
        loss, W = reference.at_layer(network(3), lambda z, t: each(z, t)[0], x[i : i + 1], y[i : i + 1], layer)
        assert float(shares[i]) == pytest.approx(float(reference.kappa(loss, W)), rel=1e-9, abs=1e-10)


@MONAI
class TestDiceOfMonai:
    """The loss of MONAI itself: its own reductions, and curvature without a second derivative by autograd."""

    @pytest.mark.parametrize("classes", [False, True])
    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_one_loss_a_sample_and_their_mean(self, layer: str, classes: bool) -> None:
        model, x, y = network(4), inputs(), masks()
        each, mean = monai_dice(classes=classes, reduction="none"), monai_dice(classes=classes)
        samples = lambda z, t: each(z, t).flatten(1).mean(1)
        kappas = []
        for i in range(N):
            loss, W = reference.at_layer(model, mean, x[i : i + 1], y[i : i + 1], layer)
            kappas.append(float(reference.kappa(loss, W)))
        options: dict[str, Any] = {"layer": layer, "method": "exact"}
        shares = per_sample_flatness(model, samples, (x, y), **options)
        torch.testing.assert_close(shares, torch.tensor(kappas, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        for fn in (samples, mean):
            halves = list(zip(x.split([2, 4]), y.split([2, 4]), strict=True))
            flat = relative_flatness(model, fn, halves, **options)
            assert flat.value == pytest.approx(sum(kappas) / N, rel=1e-8, abs=1e-10)

    @pytest.mark.parametrize("options", [{}, {"batch": True}, {"classes": True}])
    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_against_differences(self, layer: str, options: dict[str, Any]) -> None:
        """Hessian from slopes at moved weights; GGN from outputs and slopes of the loss at moved outputs."""
        model, x, y, fn = network(4), inputs(), masks(), monai_dice(**options)
        W = model.get_submodule(layer).weight
        slope = lambda: torch.autograd.grad(fn(model(x), y), W)[0].flatten()
        H, J = [], []
        for i in range(W.numel()):
            ends = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    W.view(-1)[i] += h
                ends.append((slope(), model(x).detach().flatten()))
                with torch.no_grad():
                    W.view(-1)[i] -= h
            H.append((ends[0][0] - ends[1][0]) / 2e-5)
            J.append((ends[0][1] - ends[1][1]) / 2e-5)
        z = model(x).detach()
        rows = []
        for i in range(z.numel()):
            step = torch.zeros_like(z)
            step.view(-1)[i] = 1e-5
            two = [v.requires_grad_() for v in (z + step, z - step)]
            up, down = (torch.autograd.grad(fn(v, y), v)[0] for v in two)
            rows.append((up - down).flatten() / 2e-5)
        jacobian = torch.stack(J, 1)
        ggn = jacobian.T @ torch.stack(rows) @ jacobian
        for curvature, matrix in (("hessian", torch.stack(H)), ("ggn", ggn)):
            want = float(reference.kappa_of_hessian(W.detach(), matrix.reshape(*W.shape, *W.shape)))
            flat = relative_flatness(model, fn, (x, y), layer=layer, curvature=curvature, method="exact")
            assert flat.value == pytest.approx(want, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_a_share_for_each_sample_needs_samples_that_are_not_coupled(name: str) -> None:
    case = LOSSES[name]
    model, x, y = network(case.width), inputs(), case.y()
    each = lambda z, t: case.fn(z, t) * torch.ones(N, dtype=z.dtype)
    with FAM(each, model, "0", strength=1.0, curvature="hessian", method="exact") as fam:
        outputs = model(x)
        with pytest.raises(
            LossError, match=r"losses of shape \(6,\).*'0' has 1 shares.*use a criterion that reduces"
        ):
            fam(outputs, y)


class TestCTC:
    """No second derivative: an error that names the operation, and finite differences."""

    LENGTHS = torch.full((2,), 4), torch.full((2,), 2)

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(z.log_softmax(-1), y, *self.LENGTHS, blank=0)

    def setup_method(self) -> None:
        self.x, self.y = torch.randn(4, 2, IN).double(), torch.tensor([[1, 2], [2, 1]])

    @pytest.mark.parametrize("method", ["exact", "probe"])
    @pytest.mark.parametrize("curvature", ["hessian", "ggn"])
    def test_names_the_operation_and_the_remedy(self, curvature: str, method: str) -> None:
        model = network(3)
        with FAM(self.loss, model, "0", strength=1.0, curvature=curvature, method=method) as fam:
            outputs = model(self.x)
            with pytest.raises(GraphError, match=r"_ctc_loss_backward.*finite_difference"):
                fam(outputs, self.y)

    @pytest.mark.parametrize("layer", ["0", "2"])
    def test_finite_differences(self, layer: str) -> None:
        model = network(3)
        W = model.get_submodule(layer).weight
        columns = []
        for i in range(W.numel()):
            slopes = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    W.view(-1)[i] += h
                slopes.append(torch.autograd.grad(self.loss(model(self.x), self.y), W)[0].flatten())
                with torch.no_grad():
                    W.view(-1)[i] -= h
            columns.append((slopes[0] - slopes[1]) / 2e-5)
        H = torch.stack(columns).reshape(*W.shape, *W.shape)
        want = float(reference.kappa_of_hessian(W.detach(), H))
        flat = relative_flatness(
            model, self.loss, (self.x, self.y), layer=layer, method="finite_difference", probes=300
        )
        assert abs(flat.value - want) <= 4 * flat.stderr
        assert flat.stderr < 0.2 * abs(want)
        with FAM(
            self.loss, model, layer, strength=1.0, curvature="hessian", method="finite_difference", probes=4
        ) as fam:
            fam(model(self.x), self.y).backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("classes", [25, 26, 60])  # on both sides of where another formula is the cheaper one
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "sum"}])
def test_closed_forms_of_few_and_of_many_classes(classes: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, loss_fn = (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, classes)).double(),
        nn.CrossEntropyLoss(**options),
    )
    x, y = torch.randn(5, 4).double(), torch.randint(classes, (5,))
    kappa = lambda: float(reference.kappa(*reference.at_layer(net, loss_fn, x, y, "2")).detach())
    flat = relative_flatness(net, loss_fn, (x, y), layer="2")
    assert (flat.method, flat.value) == ("closed_form", pytest.approx(kappa(), rel=1e-9))
    with FAM(loss_fn, net, "2", strength=1.0) as fam:
        (fam(net(x), y) - loss_fn(net(x), y)).backward()
    h = 1e-6
    for p in (net[2].weight, net[0].weight):
        v, ends = torch.randn_like(p), []
        for side in (1, -1):
            with torch.no_grad():
                p.add_(side * h * v)
            ends.append(kappa())
            with torch.no_grad():
                p.sub_(side * h * v)
        assert float((p.grad * v).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)
