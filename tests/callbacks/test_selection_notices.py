"""Messages at the start of a run about weights that are not selected, and about zeros kept by mistake."""

from __future__ import annotations

import logging
import warnings
from functools import partial

import pytest
import torch
from every_form import FORMS, LOG_SUM, each_kind, one_of_each_kind
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from torch import nn
from toys import Moved, Toy, data, trainer

from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty, Sparsify, SparsityMonitor
from lightning_sparse.conformance._networks import Conv1D, own_layers

PASSES = r"1 of 3 weight matrices, 3.9% of the parameters: by default not those of layers other than torch's own"
ZERO = r"all weights of 'network.2.weight' are zero at the start"
Penalty = partial(ReweightedPenalty, LOG_SUM, 0.5)


def matrices(module):
    return {name: p for name, p in module.named_parameters() if p.dim() > 1}


def texts(said, word):
    return [str(one.message) for one in said if word in str(one.message)]


def zero_head():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.zeros_(network[2].weight)
    return network


# -- matrices of the user's own layers ------------------------------------------------------------------------------------


def test_the_default_selection_names_omitted_matrices_once():
    module, callback = Toy(own_layers()), Penalty()
    with pytest.warns(UserWarning, match=PASSES) as said:
        trainer(callback).fit(module, data())
    (text,) = texts(said, "selects")
    assert text.startswith("ReweightedPenalty selects")
    assert "'network.0.weight' (Conv1D), 'network.2.gate_up' (Experts) with 94.6% of the parameters" in text
    assert list(callback.parameters) == ["network.4.weight"]


@each_kind
def test_wildcards_train_matrices_of_custom_layers_to_exact_zeros(form):
    module = Toy(own_layers())
    run = trainer(form(select=["*"]), epochs=6)
    run.fit(module, data())
    weights = matrices(module)
    zeros, size = sum(int((w == 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())
    assert set(run.callbacks[0].parameters) == weights.keys()
    assert all(bool(w.isfinite().all()) for w in weights.values())
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(zeros / size, abs=1e-6)
    assert any((weights[name] == 0).any() for name in ("network.0.weight", "network.2.gate_up"))


@pytest.mark.parametrize("name", ["mask", "VarDrop, local", "VarDrop, additive"])
def test_noise_falls_back_to_the_weights_of_own_layers(name):
    more = {"alpha_min": 1e-3} if name == "mask" else {}  # noise that does not fade within these few steps
    callback, moved = FORMS[name](select=["*"], **more), Moved()
    trainer(callback, moved, epochs=1).fit(module := Toy(own_layers()), data())
    own = matrices(module).keys() - {"network.4.weight"}  # the only layer with observed inputs and outputs
    assert len(own) == 2
    assert moved.seen[1:] == [own] * 3  # because the first masks are not calibrated


def test_small_shares_are_logged_and_not_warned_of(caplog):
    logging.getLogger("lightning.pytorch").propagate = True
    network = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 3), Conv1D(3, 3))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(Penalty(), epochs=1).fit(Toy(network), data())
    assert any("selects 2 of 3 weight matrices" in record.getMessage() for record in caplog.records)


def test_another_callbacks_weights_are_not_passed_over():
    own = [Penalty(), Penalty(select=["network.0.weight", "network.2.gate_up"])]
    run = trainer(*own, epochs=1)
    run.fit(Toy(own_layers()), data())
    assert [len(one.parameters) for one in own] == [1, 2]


@pytest.mark.parametrize("others", [[], [partial(ModelPruning, "l1_unstructured", amount=0.5)]], ids=["alone", "ModelPruning"])
def test_a_monitor_warns_once_about_weights_that_it_does_not_count(others):
    run = trainer(*(make() for make in others), SparsityMonitor(), epochs=1)
    module = Toy(own_layers())
    with pytest.warns(UserWarning, match="SparsityMonitor counts 1 of 3 weight matrices") as said:
        run.fit(module, data())
    assert len(texts(said, "SparsityMonitor")) == 1
    run.validate(module, data(), verbose=False)


def test_a_monitor_leaves_logging_to_a_sparsity_callback():
    with pytest.warns(UserWarning, match=PASSES) as said:
        trainer(SparsityMonitor(), Penalty(), epochs=1).fit(Toy(own_layers()), data())
    assert len(texts(said, "weight matrices")) == 1
    trainer(SparsityMonitor(["*"]), Penalty(select=["*"]), epochs=1).fit(Toy(own_layers()), data())


def test_a_frozen_body_is_reported_unless_the_selection_names_the_rest():
    def body():
        network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        network[0].requires_grad_(False)
        return Toy(network)

    with pytest.warns(UserWarning, match=r"selects 1 weight matrix, 24.8% of the module's parameters; 66.1% are matrices that are frozen"):
        trainer(Penalty(), epochs=1).fit(body(), data())
    trainer(Penalty(select=["network.2.*"]), epochs=1).fit(body(), data())


class Thawed(Toy):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)))

    @property
    def backbone(self):
        return self.network[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_no_message_about_a_body_that_a_finetuning_callback_unfreezes():
    callback = Penalty()
    trainer(BackboneFinetuning(1, train_bn=False), callback, epochs=3).fit(Thawed(), data())
    assert len(callback.parameters) == 2


# -- zeros that are kept by mistake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(ReweightedPenalty, LOG_SUM, 0.01, keep_zeros=True), "and keep_zeros=True keeps them there"),
        (partial(MagnitudePruning, 0.5, keep_zeros=True), "and keep_zeros=True keeps them there"),
        (partial(MagnitudePruning, 0.6, start=0.5), "and MagnitudePruning prunes them before the first step and keeps them there"),
    ],
)
def test_a_zero_initialised_layer_that_is_held_at_zero_is_named(make, why):
    module = Toy(zero_head())
    with pytest.warns(UserWarning, match=ZERO) as said:
        trainer(make()).fit(module, data())
    (text,) = texts(said, "at the start")
    assert why in text
    assert "select=['!network.2.weight']" in text
    assert int((module.network[2].weight != 0).sum()) <= 1  # ranking keeps one of each matrix


@pytest.mark.parametrize(
    "make",
    [partial(MagnitudePruning, 0.6, every=1), partial(AdaptiveProx, LOG_SUM, 5.0), partial(ReweightedPenalty, LOG_SUM, 5.0)],
    ids=["pruned", "prox", "penalty"],
)
def test_a_zero_initialised_layer_that_ends_at_zero_is_named(make):
    module = Toy(zero_head())
    with pytest.warns(UserWarning, match=r"all weights of 'network.2.weight' were zero at the start and are zero at the end") as said:
        trainer(make(), epochs=6).fit(module, data())
    (text,) = texts(said, "at the end")
    assert f"{make.func.__name__} may have removed them before they could learn" in text
    assert text.endswith("exclude them with select=['!network.2.weight']")
    assert int((module.network[2].weight != 0).sum()) <= 1  # ranking keeps one of each matrix


def test_one_that_learnt_or_was_not_zero_at_first_is_not_named():
    module = Toy(zero_head())
    trainer(AdaptiveProx(LOG_SUM, 1e-3), epochs=6).fit(module, data())
    assert (module.network[2].weight != 0).any()
    trainer(AdaptiveProx(LOG_SUM, 5.0), epochs=6).fit(module := Toy(), data())
    assert (module.network[2].weight == 0).all()


class BaseTunerLayer:
    """A class named like PEFT's."""


class LoraLinear(nn.Module, BaseTunerLayer):
    """A class named like PEFT's layer, with the same names of submodules."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted():
    """Build a model like ``get_peft_model``, with the prefix ``base_model.model`` in every name."""
    layers = nn.ModuleList([LoraLinear(nn.Linear(8, 8), 2) for _ in range(3)])
    return nn.ModuleDict({"base_model": nn.ModuleDict({"model": nn.Sequential(*layers, nn.Linear(8, 3).requires_grad_(False))})})


class Tuned(Toy):
    def __init__(self):
        super().__init__(adapted())

    def forward(self, x):
        return self.network["base_model"]["model"](x)


def test_adapters_that_never_learn_are_named_by_a_pattern_that_spares_them_all():
    module = Tuned()
    pattern = "network.base_model.model.*.lora_B.default.weight"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(MagnitudePruning(0.6, every=1)).fit(module, data())
    (text,) = texts(said, "at the end")
    assert text.endswith(f"exclude them with select=['!{pattern}']")
    (text,) = texts(said, "adapters")
    assert "selects 6 weight matrices, 28.3% of the module's parameters; 63.7% are matrices that are frozen" in text
    run = trainer(MagnitudePruning(0.6, every=1, select=["*lora_*", "!" + pattern]))
    run.fit(module := Tuned(), data())
    assert all((p != 0).any() for name, p in module.named_parameters() if "lora_B" in name)


def test_a_pattern_that_selects_only_adapters_is_reported():
    with pytest.warns(UserWarning, match=r"63.7% are matrices which select=\['\*base\*'\] matches, too, but that are frozen"):
        trainer(AdaptiveProx(LOG_SUM, 1e-3, select=["*base*"]), epochs=1).fit(Tuned(), data())
    trainer(AdaptiveProx(LOG_SUM, 1e-3, select=["*base*", "!*base_layer*", "!*.3.weight"]), epochs=1).fit(Tuned(), data())


def test_leaving_it_out_as_advised_lets_it_learn_without_a_warning():
    module = Toy(zero_head())
    trainer(ReweightedPenalty(LOG_SUM, 0.01, keep_zeros=True, select=["!network.2.weight"])).fit(module, data())
    assert (module.network[2].weight != 0).any()


# at lam 0.5 the two others hold such a layer at zero
LEARNING = [form for form in one_of_each_kind if form.id not in ("frozen", "mask, Bernoulli")]


@pytest.mark.filterwarnings("ignore:all weights of 'network.2.weight' were zero at the start and are zero at the end")
@pytest.mark.parametrize("form", LEARNING)
def test_without_keep_zeros_a_zero_initialised_layer_learns(form):
    module, moved = Toy(zero_head()), []
    run = trainer(form(), epochs=2)
    module.on_train_batch_end = lambda *args: moved.append(bool((module.network[2].weight != 0).any()))
    run.fit(module, data())
    assert any(moved)


def test_a_resumed_run_does_not_repeat_the_warning(tmp_path):
    make = partial(ReweightedPenalty, LOG_SUM, 0.01, keep_zeros=True)
    first = trainer(make(), epochs=1)
    with pytest.warns(UserWarning, match=ZERO):
        first.fit(Toy(zero_head()), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(make(), epochs=2).fit(Toy(zero_head()), data(), ckpt_path=tmp_path / "a.ckpt")
    assert texts(said, "at the start") == []


def test_a_sparse_start_with_some_weights_in_each_layer_is_not_named():
    network = zero_head()
    nn.init.eye_(network[2].weight)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(ReweightedPenalty(LOG_SUM, 0.01, keep_zeros=True)).fit(Toy(network), data())
    assert texts(said, "at the start") == []


@pytest.mark.parametrize(("form", "again"), [(Sparsify, True), (MagnitudePruning, True), (partial(Sparsify, keep_zeros=True), False)])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_many_zeros_at_the_start_that_are_trained_again_are_logged(form, again, share, caplog):
    module = Toy()
    with torch.no_grad():
        for w in module.parameters():
            w.view(-1)[: int(share * w.numel())] = 0
    with caplog.at_level("INFO"):
        trainer(form(0.8), epochs=2).fit(module, data())
    lines = [record.getMessage() for record in caplog.records if "are trained again; keep_zeros=True keeps them" in record.getMessage()]
    assert len(lines) == (again and share == 0.5)
    assert all("50.0% of the selected weights are zero at the start" in line for line in lines)


def test_zeros_that_the_callback_made_at_the_start_are_not_said_to_be_trained_again(tmp_path, caplog):
    dense = trainer(epochs=9)
    dense.fit(Toy(), data())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    module = Toy()
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Sparsify(0.8, freeze=0.7), epochs=10, limit_train_batches=1).fit(module, data(), ckpt_path=tmp_path / "dense.ckpt")
    assert sum(int((w == 0).sum()) for w in module.parameters() if w.dim() > 1) > 0
    assert "are zero at the start" not in caplog.text


def half_zero():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight *= torch.rand_like(layer.weight) > 0.5
    return Toy(network)


def test_zeros_that_keep_zeros_does_not_keep_are_named(recwarn):
    share = float((half_zero().network[2].weight == 0).float().mean())
    said = rf"keeps the zeros of the weights that Sparsify selects; {share:.1%} of the 48 others are zero .* such as 'network.2.weight'"
    with pytest.warns(UserWarning, match=said):
        trainer(Sparsify(0.7, keep_zeros=True, select=["network.0.weight"])).fit(half_zero(), data())
    recwarn.clear()
    both = [Sparsify(0.7, keep_zeros=True, select=[f"network.{i}.weight"]) for i in (0, 2)]
    trainer(*both).fit(half_zero(), data())
    trainer(Sparsify(0.7, keep_zeros=True)).fit(half_zero(), data())
    trainer(Sparsify(0.7, select=["network.0.weight"])).fit(half_zero(), data())
    assert not [one for one in recwarn if "others are zero" in str(one.message)]
