"""Every public class documents all its arguments; errors of wrong calls name the class."""

from __future__ import annotations

import inspect
import pydoc
import re
from dataclasses import dataclass

import pytest

from lightning_sparse import (
    _docstrings,
    callbacks,
    curvature,
    duality,
    gates,
    mask_rules,
    metrics,
    noise,
    penalties,
    schedules,
    scores,
    structure,
)
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, SparseCheckpoint
from lightning_sparse.cli.plot import read
from lightning_sparse.duality import Penalty
from lightning_sparse.examples import batches, classifier, digits, lenet5, mlp, mnist, vit

EXAMPLES = [classifier.Classifier, mlp.MLP, lenet5.LeNet5, vit.ViT, digits.Digits, mnist.MNIST, batches.Batches, batches.ShuffledBatches]
PUBLIC = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (callbacks, penalties, mask_rules, schedules, noise, curvature, metrics, duality, gates, scores, structure)
    for name in getattr(room, "__all__", dir(room))
    if inspect.isclass(getattr(room, name)) and (hasattr(room, "__all__") or getattr(room, name).__module__ == room.__name__)
} | {cls.__name__: cls for cls in EXAMPLES}
LOG_SUM = penalties.LogSum(eps=2.0)


@pytest.mark.parametrize("cls", PUBLIC.values(), ids=PUBLIC)
def test_all_arguments_are_described(cls):
    described = _docstrings.split(cls.__doc__ or "")[1]
    assert [name for name in _docstrings.parameters(cls) if not described.get(name, "").strip()] == []
    assert "ther arguments are" not in cls.__doc__


@pytest.mark.parametrize("cls", [getattr(callbacks, name) for name in callbacks.__all__], ids=callbacks.__all__)
def test_help_shows_them_in_the_order_of_the_signature(cls):
    shown = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    places = [shown.find(f"\n |      {name}: ") for name in _docstrings.parameters(cls)]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("cls", [callbacks.VariationalDropout, callbacks.MagnitudePruning])
def test_errors_of_callbacks_without_lam_do_not_mention_lam(cls):
    assert "lam" not in inspect.signature(cls).parameters
    assert "``lam``" not in inspect.getdoc(cls)
    assert "a lam " not in inspect.getdoc(cls)


def test_a_base_describes_what_a_subclass_takes_too():
    class Mine(ReweightedPenalty):
        """Train in my way.

        Args:
            lam: how strongly.
            extra: of mine.

        Raises nothing.
        """

        def __init__(self, penalty, lam=None, extra=1, **options):
            super().__init__(penalty, lam, **options)

    text, words = _docstrings.split(Mine.__doc__)
    assert text == "Train in my way.\n\nRaises nothing."
    assert (words["lam"], words["extra"]) == ("how strongly.", "of mine.")
    assert words["tol"] == _docstrings.split(ReweightedPenalty.__doc__)[1]["tol"]
    assert list(words) == ["penalty", "lam", "extra", *list(inspect.signature(ReweightedPenalty).parameters)[2:]]


def test_a_class_without_a_docstring_inherits_it():
    class Mine(AdaptiveMask):
        pass

    assert Mine.__doc__ is None
    assert inspect.getdoc(Mine) == AdaptiveMask.__doc__.strip()


def test_the_command_line_shows_them(capsys):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(callbacks.Sparsifier, "sparsify")
    with pytest.raises(SystemExit):
        parser.parse_args(["--sparsify.help", "AdaptiveMask"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, words in _docstrings.split(AdaptiveMask.__doc__)[1].items():
        assert " ".join(words.split())[:60] in shown, name


@dataclass(frozen=True)
class Wide(Penalty):
    """A user's penalty."""

    width: float
    height: float = 1.0
    omega = eta_hat = lambda self, w: w.abs()


class Handed(ReweightedPenalty):
    """A user's callback that forwards all arguments."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)


class Named(penalties.LogSum):
    """A user's subclass of a penalty of the package."""


class Strong(AdaptiveProx):
    """A user's subclass of a callback."""


CALL = "ReweightedPenalty(penalty=penalties.LogSum(eps=2.0), lam=1e-3)"
WRONG = {
    "nothing": (ReweightedPenalty, (), {}, f"ReweightedPenalty needs 'penalty', for example {CALL}; it takes penalty, "),
    "of a base's __init__": (callbacks.PenaltyLoss, (), {}, "PenaltyLoss needs 'penalty'"),
    "misspelt": (AdaptiveProx, (LOG_SUM,), {"lamb": 1}, "AdaptiveProx takes no 'lamb'; closest: 'lam'"),
    "too many": (penalties.LogSum, (1, 2), {}, "LogSum got 2 arguments by position and takes at most 1 that way; it takes eps"),
    "twice": (penalties.LogSum, (1,), {"eps": 2}, "LogSum got 'eps' twice"),
    "a user's dataclass": (Wide, (), {"height": 2}, "Wide needs 'width'; it takes width, height=1.0"),
    "a user's subclass": (Named, (), {}, "Named needs 'eps'"),
    "passed on, missing": (Handed, (), {}, "Handed: missing 1 required positional argument: 'penalty'"),
    "passed on, misspelt": (Handed, (LOG_SUM,), {"seect": []}, "Handed takes no 'seect'; closest: 'select'"),
    "Lightning's own": (SparseCheckpoint, (0.5,), {"monitr": "x"}, "SparseCheckpoint takes no 'monitr'; closest: 'monitor'"),
    "lam": (ReweightedPenalty, (LOG_SUM,), {}, "ReweightedPenalty needs lam, its strength, such as lam=1e-3; or give target"),
    "lam, by a user's subclass": (Strong, (LOG_SUM,), {}, "Strong needs lam, its strength"),
    "lam of gates": (callbacks.HardConcrete, (), {}, "HardConcrete needs lam, its strength, such as lam=1e-3; or give target"),
    "a schedule's": (schedules.LinearWarmup, (), {}, "LinearWarmup needs 'lam'"),
    "an estimate's": (curvature.SampledFisher, (), {"likelyhood": 1}, "SampledFisher takes no 'likelyhood'; closest: 'likelihood'"),
}


@pytest.mark.parametrize("form", ["AdaptiveMask", "EtaTrick", "PenaltyLoss", "ReweightedPenalty", "Sparsify", "LogSum", "SCAD"])
def test_the_example_in_the_error_of_a_missing_argument_works(form):
    cls = getattr(callbacks, form, None) or getattr(penalties, form)
    with pytest.raises(TypeError, match="for example") as caught:
        cls()
    call = re.search(r"for example (.*?); it takes", str(caught.value))[1]
    made = eval(call, {"penalties": penalties, form: cls})
    assert type(made) is cls


@pytest.mark.parametrize("case", WRONG)
def test_errors_of_wrong_calls_name_the_class(case):
    cls, args, options, expected = WRONG[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        cls(*args, **options)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("make", [lambda: ReweightedPenalty(LOG_SUM), callbacks.HardConcrete], ids=["a penalty's", "of gates"])
def test_a_missing_lam_raises_type_error(make):
    with pytest.raises(TypeError, match=r"needs lam, its strength, such as lam=1e-3; or give target_sparsity=0.95"):
        make()


def test_an_error_raised_inside_is_unchanged():
    class Fails(ReweightedPenalty):
        def __init__(self):
            len(5)

    with pytest.raises(TypeError, match="has no len"):
        Fails()
    with pytest.raises(TypeError, match="abstract"):
        Penalty()


NAMES = {name: getattr(room, name) for room in (noise, curvature, schedules, mask_rules, penalties, callbacks) for name in dir(room)}
# VariationalDropout and HardConcrete are the callbacks, because they were imported last
TYPED = [
    "ReweightedPenalty(penalty=LogSum(eps=2.0), lam=0.001)",
    "ReweightedPenalty(penalty=Standout(a=3.0, b=0.0), lam=1.0, select=['*', '!head.*'], threshold=0.01)",
    "PenaltyLoss(penalty=MCP(c=1.0), lam=LinearWarmup(lam=0.1, share=0.5), freeze=0.25, keep_zeros=True)",
    "AdaptiveProx(penalty=L1(), lam=0.1, compile=True, metric='plain', exact=True)",
    "AdaptiveMask(penalty=L1(), lam=1e-05, freeze=0.25, target_sparsity=0.9, noise=ScaledBernoulli(), curvature=None)",
    "EtaTrick(penalty=L1(), lam=0.1, learned_lr=0.5)",
    "VariationalDropout(kl_weight=0.001, prior='molchanov', noise='local')",
    "HardConcrete(lam=Cubic(lam=0.1, begin=0.0, end=0.5, start=0.0), gamma=-0.2)",
    "MagnitudePruning(sparsity=0.9, every=10, scope='layer')",
    "SparsityMonitor(select=['a'], every_n_epochs=2)",
    "SparseCheckpoint(monitor='val', mode='max', target_sparsity=0.9)",
    "EmpiricalFisher(decay=0.5, every=2, reduction='sum')",
    "Gaussian(local=True, share=0.5)",
]


@pytest.mark.parametrize("text", TYPED)
def test_printed_values_can_be_evaluated(text):
    made = eval(text, dict(NAMES))
    assert repr(made) == text
    if hasattr(made, "recipe"):
        assert eval(repr(made), dict(NAMES)).recipe() == made.recipe()


def test_a_users_argument_is_printed():
    class Mine(ReweightedPenalty):
        def __init__(self, penalty, lam, extra=1):
            super().__init__(penalty, lam)
            self.extra = extra

    assert repr(Mine(LOG_SUM, 0.5, 3)) == "Mine(penalty=LogSum(eps=2.0), lam=0.5, extra=3)"
    assert repr(read("LogSum")) == repr(penalties.LogSum(**penalties.LogSum.examples[0]))
