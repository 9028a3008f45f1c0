"""Selection by names, schedules by steps, noise by moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from lightning_sparse import elementwise, noise, schedules
from lightning_sparse.select import countable, left_out, select


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([2, 2]), nn.Conv2d(1, 2, 3), nn.ConvTranspose1d(1, 2, 3))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(4, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.free = nn.Parameter(torch.ones(3, 3))
        self.wave = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


DEFAULT = {
    "encoder.0.weight",
    "encoder.2.weight",
    "encoder.3.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "recurrent.weight_ih_l0",
    "recurrent.weight_hh_l0",
    "head.weight",
}


def test_default_selection_is_the_weight_matrices():
    assert set(select(Zoo())) == DEFAULT


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*", "!head.*"], (DEFAULT | {"free"}) - {"head.weight"}),
        (["!recurrent.*", "!attention.*"], {"encoder.0.weight", "encoder.2.weight", "encoder.3.weight", "head.weight"}),
        (["encoder.?.weight"], {"encoder.0.weight", "encoder.2.weight", "encoder.3.weight"}),
        (["free", "encoder.0.*"], {"free", "encoder.0.weight"}),
        (["encoder.1.weight"], {"encoder.1.weight"}),
        (["head.weight", "embedding.weight"], {"head.weight"}),
    ],
)
def test_patterns(patterns, expected):
    chosen = select(Zoo(), patterns)
    assert set(chosen) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["encodr.*"], r"select pattern 'encodr.\*' matches no selectable parameter; closest: 'encoder"),
        (["*.bias"], r"matches only \[.*'encoder.0.bias'.*which are not selected by default: name them in full"),
        (["haed.weight"], r"select name 'haed.weight' is no parameter of Zoo; closest: 'head.weight'"),
        (["*", "!nothing.*"], r"select exclusion '!nothing.\*' matches nothing"),
        (["head.*", "!head.*"], r"leaves no parameter"),
        (["frozen.weight"], r"requires_grad=False; it must be trained"),
        (["wave"], r"'wave' is complex; only real"),
    ],
)
def test_bad_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        select(Zoo(), patterns)


def test_a_model_without_weights():
    with pytest.raises(ValueError, match="Embedding has no selectable weight"):
        select(nn.Embedding(2, 2))


def test_frozen_weights_can_be_counted():
    assert "frozen.weight" in select(Zoo(), trainable=False)


def two(weight):
    """A weight that holds its values in two parts, as quantised ones do."""
    return nn.Parameter(TwoTensor(weight.detach(), weight.detach().clone()))


def unfit(kind):
    layer = nn.Linear(4, 4, dtype=torch.complex64 if kind == "complex" else None)
    if kind == "lazy":
        layer = nn.LazyLinear(4)
    if kind == "packed":
        layer.weight = two(layer.weight)
    if kind == "integer":
        layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer, nn.Linear(4, 4))


UNFIT = {
    "complex": "'0.weight' is complex; only real floating parameters can be sparsified; or leave it out",
    "lazy": "'0.weight' has no shape yet; run a batch through its lazy layer first",
    "packed": "'0.weight' is a TwoTensor; a quantised or otherwise packed tensor has no elements that could become zero",
    "integer": "'0.weight' is torch.int8; a quantised weight is not trained: sparsify first, then quantise",
}


@pytest.mark.parametrize(("kind", "message"), UNFIT.items(), ids=UNFIT.keys())
def test_unfit_weights_are_refused_where_they_are_asked_for(kind, message):
    for patterns in (None, ["*"], ["0.weight"], ["0.*"]):
        with pytest.raises(ValueError, match=message):
            select(unfit(kind), patterns)
    for patterns in (["!0.weight"], ["1.*"], ["*", "!0.*"], ["1.weight"]):
        assert list(select(unfit(kind), patterns)) == ["1.weight"]


def test_a_frozen_complex_weight_is_passed_over_as_any_frozen_one():
    module = unfit("complex")
    module[0].requires_grad_(False)
    assert list(select(module)) == ["1.weight"]


@pytest.mark.slow
def test_torchaos_quantised_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    module = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 2))
    quantization.quantize_(module[0], quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"'0.0.weight' is a \w+; a quantised or otherwise packed tensor"):
        select(module)
    assert list(select(module, ["!0.*"])) == ["1.weight"]


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, ["0.weight", "0.parametrizations.weight.original1"]),
    "spectral_norm": (parametrizations.spectral_norm, ["0.weight", "0.parametrizations.weight.original"]),
    "orthogonal": (parametrizations.orthogonal, ["0.weight", "0.parametrizations.weight.original"]),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["0.weight", "0.weight_orig"]),
    "older spectral_norm": (nn.utils.spectral_norm, ["0.weight", "0.weight_orig"]),
}


@pytest.mark.parametrize(("change", "names"), COMPUTED.values(), ids=COMPUTED.keys())
def test_what_a_weight_is_computed_from_is_left_out_and_refused_by_name(change, names):
    module = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(select(module)) == list(select(module, ["!0.weight"])) == ["1.weight"]
    assert list(left_out(module)) == list(left_out(module, ["0.*"])) == ["0.weight"]
    assert left_out(module, ["!0.weight"]) == left_out(module, ["1.*"]) == {}
    for name in names:
        with pytest.raises(ValueError, match=rf"select name '{name}' cannot be sparsified: '0.weight' is computed by .* first with"):
            select(module, [name])
    with pytest.raises(ValueError, match=r"no selectable weight.*'0.weight' is computed by"):
        select(module[:1])
    assert sorted(countable(module)) == ["0.weight", "1.weight"]


def test_schedules_rise_to_lam_and_stay():
    for schedule in (schedules.LinearWarmup(2.0, 0.5), schedules.Cubic(2.0, 0.1, 0.6)):
        values = [schedule(step, 100) for step in range(101)]
        assert values == sorted(values)
        assert (values[0], values[-1], values[60]) == (0.0, 2.0, 2.0)
    assert schedules.LinearWarmup(2.0, 0.5)(25, 100) == 1.0
    # a cubic ramp has covered 1 - (1/2)^3 of the way at half of its time
    assert schedules.Cubic(2.0, 0.1, 0.6)(35, 100) == pytest.approx(2 * 7 / 8)
    assert schedules.Constant(2.0)(0, float("inf")) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Constant(0.0), "lam must be a finite number > 0, got 0.0"),
        (lambda: schedules.Constant(float("nan")), "lam must be a finite number > 0, got nan"),
        (lambda: schedules.LinearWarmup(1.0, 0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: schedules.Cubic(1.0, 0.5, 0.5), r"end must lie in \(0.5, 1\], got 0.5"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian()])
def test_noise_has_mean_one_and_the_promised_variance(kind):
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.1, 0.5, 0.9):
        drawn = kind.sample(torch.full((200_000,), alpha, dtype=torch.float64), generator)
        assert drawn.mean().item() == pytest.approx(1, abs=0.03)
        assert drawn.var().item() == pytest.approx((1 - alpha) / alpha, rel=0.03)
    assert (kind.sample(torch.zeros(9), generator) == 0).all()
    assert (kind.sample(torch.ones(9), generator) == 1).all()
    again = torch.Generator().manual_seed(0)
    assert torch.equal(kind.sample(torch.full((9,), 0.5), again), kind.sample(torch.full((9,), 0.5), again.manual_seed(0)))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.123456, 0.5, 0.99999, 1.0])
def test_over_all_draws_a_bernoulli_mask_has_mean_one_exactly(alpha, monkeypatch):
    monkeypatch.setattr(elementwise, "random_words", lambda count, *_: torch.arange(65536, dtype=torch.int32).to(torch.uint16))
    mask = noise.ScaledBernoulli().sample(torch.full((65536,), alpha, dtype=torch.float64))
    assert mask.mean() == pytest.approx(1, abs=1e-12)
    assert mask.count_nonzero() / 65536 == pytest.approx(alpha, abs=1 / 65536)


def test_words_are_uniform_in_every_place_and_follow_their_generator():
    drawn = elementwise.random_words(400_002, torch.device("cpu"), torch.Generator().manual_seed(3))
    assert drawn.shape == (400_002,)
    for place in range(4):  # the four quarters of a 64-bit draw
        counts = torch.bincount(drawn[place::4].long() // 4096, minlength=16)
        assert (counts - 6250).abs().max() < 6 * 6250**0.5
    generator = torch.Generator().manual_seed(3)
    first, second = (elementwise.random_words(400_002, torch.device("cpu"), generator) for _ in range(2))
    assert torch.equal(first, drawn)
    assert not torch.equal(first, second)
