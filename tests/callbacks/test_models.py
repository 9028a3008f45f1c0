"""Users' models: selection, copies, casts and compilation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparsityMonitor
from lightning_sparse.conformance._networks import ComplexLayer, Computed, Quantised, SparseEmbedding, plain
from lightning_sparse.conformance.changes import COMPILED, graphs
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.weights import Attachment

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": ReweightedPenalty,
    "prox": AdaptiveProx,
    "mask": partial(AdaptiveMask, noise=noise.Gaussian(), curvature=None),
    "mask, Bernoulli": partial(AdaptiveMask, noise=noise.ScaledBernoulli(), curvature=None),
}


def sgd(lr):
    return partial(torch.optim.SGD, lr=lr)


# -- what is selected ---------------------------------------------------------------------------------------------------------


deprecations = pytest.mark.filterwarnings("ignore:.*quantize", "ignore::DeprecationWarning", "ignore::UserWarning:torch.ao.*")
REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 3)), r"'network.0.weight' has no shape yet; run a batch"),
    "complex": (ComplexLayer, r"'network.wave.weight' is complex; .* exclude it with select=\['!network.wave.weight'\]"),
    "quantised": (Quantised, r"'network.body.weight' is packed in a quantised Linear; sparsify first, then quantise; or exclude"),
}


@deprecations
@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveMask])
@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_weights_are_refused_with_advice(form, build, message):
    torch.manual_seed(0)
    module = Toy(build())
    kept = {id(p): p.detach().clone() for p in module.parameters() if not isinstance(p, nn.UninitializedParameter)}
    with pytest.raises(ValueError, match=message) as refusal:
        trainer(form(LOG_SUM, 0.5)).fit(module, data())
    assert all(torch.equal(p, kept[id(p)]) for p in module.parameters() if id(p) in kept)
    way = str(refusal.value).split("select=")[1].split("]")[0].strip("[']")
    trainer(form(LOG_SUM, 0.5, select=[way]), epochs=1).fit(module, data())
    assert any((p == 0).any() for p in module.parameters() if p.dim() == 2)


def test_a_lazy_layer_that_has_its_shape_by_configure_model_is_trained():
    class Ready(Toy):
        def configure_model(self):
            self.network(torch.zeros(1, 8))

    module = Ready(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3)))
    trainer(AdaptiveProx(LOG_SUM, 0.3)).fit(module, data())
    assert all((module.network[i].weight == 0).any() for i in (0, 2))


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveProx, AdaptiveMask])
def test_sparse_gradients_are_refused_before_training(form):
    module, tokens = Toy(SparseEmbedding(), sgd(0.1)), Repeated((torch.arange(10).reshape(2, 5), torch.tensor([0, 1])), 3)
    before = weights(module)
    with pytest.raises(ValueError, match=r"'network.embedding.weight' gets sparse gradients .* create it with sparse=False; or exclude"):
        trainer(form(LOG_SUM, 0.5, select=["network.embedding.weight"])).fit(module, tokens)
    assert all(torch.equal(w, before[name]) for name, w in weights(module).items())
    trainer(form(LOG_SUM, 0.5)).fit(module, tokens)  # not selected by default
    assert not (module.network.embedding.weight == 0).any()


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.parametrize("old", [False, True], ids=["parametrisation", "hook"])
def test_computed_weights_are_left_out_with_one_warning_or_by_name_without(old):
    module, callback = Toy(Computed(old)), ReweightedPenalty(LOG_SUM, 0.5)
    run, message = trainer(callback), r"leaves 'network.normed.weight' out: it is computed by WeightNorm from .*1 more weight is left out"
    with pytest.warns(UserWarning, match=message) as said:
        run.fit(module, data())
    assert len([one for one in said if "leaves" in str(one.message)]) == 1
    assert list(callback.parameters) == ["network.head.weight"]
    trainer(ReweightedPenalty(LOG_SUM, 0.5, select=["!network.normed.*", "!network.spectral.*"])).fit(Toy(Computed(old)), data())


def test_the_monitor_counts_computed_weights_and_does_not_move_spectral_norms_estimate():
    network = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), prune.l1_unstructured(nn.Linear(8, 3), "weight", 0.5))
    module = Toy(network, sgd(0.0))
    before = {name: buffer.clone() for name, buffer in network.named_buffers() if "original" not in name}
    monitor = SparsityMonitor()
    trainer(monitor).validate(module, data(), verbose=False)
    for _ in range(20):
        figures = monitor.figures(module)
    assert figures == {"sparsity/total": 12 / 88, "sparsity/network.0.weight": 0.0, "sparsity/network.1.weight": 0.5}
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers() if name in before)


# -- what is computed ---------------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """A batch-first model with one layer that runs time-first."""

    def __init__(self, turn):
        super().__init__()
        self.layer, self.turn = nn.Linear(8, 3), turn

    def forward(self, x):
        out = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.turn else self.layer(x)
        return out.mean(1)


def test_curvature_takes_samples_from_where_the_batch_has_them():
    x, y, found = torch.randn(6, 4, 8), torch.randint(3, (6,)), []
    for turn in (False, True):
        callback = AdaptiveMask(LOG_SUM, 0.1, noise=noise.Gaussian(), curvature=EmpiricalFisher(every=1), alpha_min=0.999)
        torch.manual_seed(0)
        trainer(callback, epochs=1).fit(Toy(Turned(turn), sgd(0.0)), Repeated((x, y)))
        found.append(callback.curvature.mean["network.layer.weight"])
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=float(found[0].max()) / 100)


class Bypassed(nn.Module):
    """A network that uses the first layer's weight without its forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.noisy = nn.Linear(8, 16), nn.Linear(16, 3), []

    def forward(self, x):
        self.noisy.append(self.fc.weight.detach().clone())
        return self.head(functional.relu(functional.linear(x, self.fc.weight, self.fc.bias)))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_run_knows_which_layers_are_bypassed(tmp_path):
    ends = []
    for epochs, path in ((1, None), (2, None), (2, tmp_path / "half.ckpt")):
        keeper = [ModelCheckpoint(tmp_path, filename="half")] if epochs == 1 else []
        torch.manual_seed(1 if path else 0)
        module = Toy(Bypassed(), sgd(0.1))
        run = trainer(AdaptiveMask(LOG_SUM, 0.3, curvature=None), *keeper, epochs=epochs, enable_checkpointing=bool(keeper))
        run.fit(module, data(), ckpt_path=path)
        ends.append((weights(module), module.network.noisy))
    assert all(torch.equal(w, ends[2][0][name]) for name, w in ends[1][0].items())
    assert all(torch.equal(w, ends[2][1][i]) for i, w in enumerate(ends[1][1][4:]))


def test_without_visible_forwards_noise_goes_to_the_weights(monkeypatch):
    """Like a module that was compiled before the run in an undetectable way."""
    monkeypatch.setattr(Attachment, "on_forward", lambda *_: None)
    seen, callback = [], AdaptiveMask(LOG_SUM, 0.3, curvature=None)
    spy = Spy(lambda moment, module: seen.append(torch.equal(module.network[0].weight, callback.attachment.live("network.0.weight"))))
    trainer(callback, spy, epochs=1).fit(Toy(), data())
    assert seen[:2] == [True, True]  # the first batch detects it
    assert seen[5:7] == [False, False]


# -- compilation --------------------------------------------------------------------------------------------------------------


def end(form, compile_=None, lam=0.3, **options):
    """Return the weights after 3 epochs, and the number of graphs compiled by the end of each batch."""
    torch._dynamo.reset()
    made, module = [], Toy()
    spy = Spy(lambda moment, _: made.append(graphs()) if moment == "batch end" else None)
    trainer(form(LOG_SUM, lam, **options), spy, epochs=3).fit(compile_(module) if compile_ else module, data(), data(seed=1))
    return {name.replace("_orig_mod.", ""): w for name, w in weights(module).items()}, made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_compiled_model_ends_as_the_eager_one_and_is_compiled_once(form, way):
    eager, compiled = end(form), end(form, way)
    for name, w in eager[0].items():
        torch.testing.assert_close(compiled[0][name], w, rtol=1e-3, atol=1e-4, msg=name)
    assert (eager[0]["network.0.weight"] == 0).any()
    assert eager[1][-1] == eager[1][0]
    assert compiled[1][0] > eager[1][-1]
    assert len(set(compiled[1][:4])) == len(set(compiled[1][4:])) == 1  # compiled in the first step and in the first validation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", COMPILED.values(), ids=COMPILED.keys())
def test_in_compiled_layers_noise_and_curvature_are_those_of_layers_that_cannot_be_seen(way, monkeypatch):
    compiled = end(AdaptiveMask, way)[0]
    for package in ("lightning_sparse.layers", "lightning_sparse.curvature.estimate"):
        monkeypatch.setattr(f"{package}.layers", lambda module, parameters: {})
    for name, w in end(AdaptiveMask)[0].items():
        torch.testing.assert_close(compiled[name], w, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_whole_graph_stays_whole():
    network = torch.compile(plain(), fullgraph=True)
    module = Toy(network)
    torch._dynamo.reset()
    trainer(AdaptiveMask(LOG_SUM, 0.3), epochs=4).fit(module, data())
    assert any((p == 0).any() for p in module.parameters() if p.dim() == 2)
