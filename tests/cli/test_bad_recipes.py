"""Invalid recipes and arguments on the command line: exit code 2, a message with the cause, no files and no W&B run."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import QUIET, refused

from lightning_sparse.cli import main

pytestmark = [pytest.mark.slow, *QUIET]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


S = "--sparsify."
LOG_SUM = "--sparsify.penalty LogSum --sparsify.penalty.eps 2.0"
SCALED = "{class_path: Scaled, init_args: {p: {class_path: LogSum, init_args: {eps: -1}}, t: 1}}"
BESIDE = "sparsify: 'target_sparsity' beside class_path: arguments of Sparsify belong under init_args"
UNDER = "write {class_path: Sparsify, init_args: {target_sparsity: 0.9}}"
WORDS = {
    "lam of text": ([S + "lam", "much"], ["sparsify.lam", "must be a number"]),
    "lam nan": ([S + "lam", ".nan"], ["lam must be a finite number > 0, got nan"]),
    "lam of a word": ([S + "lam", "strong"], ["sparsify.lam: must be a number (float)"]),
    "structure": ([S + "structure", "Channel"], ["sparsify.structure: no class 'Channel'; closest: 'Channels'"]),
    "score": (["--sparsify", "MagnitudePruning", S + "score", "Magnitud"], ["sparsify.score: no class 'Magnitud'; closest: 'Magnitude'"]),
    "schedule": ([S + "lam", "LinearWarmup", S + "lam.lam", "1", S + "lam.share", "0"], ["share must lie in (0, 1], got 0.0"]),
    "schedule's name": ([S + "lam", "Cubicc"], ["no class 'Cubicc'", "'Cubic'"]),
    "schedule's order": ([S + "lam", "Cubic", S + "lam.lam", "1", S + "lam.begin", "0.8"], ["end must lie in (0.8, 1]"]),
    "p": ([S + "penalty", "Lp", S + "penalty.p", "2"], ["p must lie in (0, 2), got 2.0"]),
    "no p": ([S + "penalty", "Lp"], ["sparsify.penalty: Lp needs 'p', such as `{class_path: Lp, init_", "or --sparsify.penalty.p "]),
    "prior": ([S + "penalty", "VariationalDropout", S + "penalty.prior", "log_unifrom"], ["closest: 'log_uniform'"]),
    "nested": ([S + "penalty", SCALED], ["eps must be a finite number > 0, got -1.0"]),
    "not separable": ([S + "penalty", "TopK", S + "penalty.density", "0.5"], ["needs a separable penalty, TopK"]),
    "a number for a penalty": ([S + "penalty", "3"], ["sparsify.penalty: no class '3'"]),
    "no penalty": ([S + "penalty", "null"], ["sparsify: ReweightedPenalty needs 'penalty'", LOG_SUM]),
    "select of text": ([S + "select", "layers.*"], ["sparsify.select: must be a list such as ['layers.*'], got 'layers.*'"]),
    "select of numbers": ([S + "select", "[3]"], ["sparsify.select", "got 3"]),
    "select nothing": ([S + "select", "[]"], ["select=[] selects nothing"]),
    "select no match": ([S + "select", "['!foo*']"], ["'!foo*' matches nothing", "layers.1.weight"]),
    "select all out": ([S + "select", "['!*']"], ["leaves no parameter"]),
    "freeze": ([S + "freeze", "1"], ["freeze must lie in [0, 1), got 1.0"]),
    "threshold": ([S + "threshold", "-1"], ["threshold must lie in [0, inf), got -1.0"]),
    "half a sample": ([S + "gap_samples", "1.5"], ["sparsify.gap_samples", "whole number", "1.5"]),
    "keep_zeros": ([S + "keep_zeros", "maybe"], ["sparsify.keep_zeros", "true or false", "maybe"]),
    "metric": (["--sparsify", "AdaptiveProx", S + "metric", "adamw"], ["sparsify.metric", "'auto', 'adam', 'plain'", "adamw"]),
    "noise": (["--sparsify", "AdaptiveMask", S + "noise", "Gausian"], ["sparsify.noise: no class 'Gausian'"]),
    "another form's key": (["--sparsify", "AdaptiveMask", S + "metric", "adam"], ["AdaptiveMask takes no 'metric'"]),
    "a callback that is no form": (["--sparsify", "EarlyStopping"], ["no class 'EarlyStopping'"]),
    "no module": (["--sparsify", "no.such.Class"], ["No module named 'no'"]),
    "the base class": (["--sparsify", "Sparsifier"], ["use Sparsify, ReweightedPenalty, AdaptiveProx or AdaptiveMask"]),
    "epochs": (["--trainer.max_epochs", "ten"], ["trainer.max_epochs", "whole number"]),
    "accelerator": (["--trainer.accelerator", "quantum"], ["quantum", "cpu"]),
    "strategy": (["--trainer.strategy", "fsdp"], ["fsdp", "GPU"]),
    "sizes": (["--model.sizes", "[64]"], ["sizes must name at least the inputs and the classes"]),
    "lr": (["--model.lr", "0"], ["lr must be a finite number > 0, got 0.0"]),
    "model": (["--model", "NoModel"], ["model: no class 'NoModel'"]),
    "split": (["--data.validation", "1.5"], ["validation must lie in (0, 1), got 1.5"]),
    "batch size": (["--data.batch_size", "0"], ["batch_size must be a finite number > 0, got 0"]),
    "seed": (["--seed_everything", "-1"], ["seed_everything", "from 0 to 2**32 - 1, got -1"]),
    "threads": (["--threads", "0"], ["threads", "v>0"]),
    "a second recipe": (["--config", "nofile"], ["no recipe 'nofile'"]),
    "a missing file": (["--config", "nofile.yaml"], ["no file 'nofile.yaml', and no recipe of this name"]),
    "no target": (["--sparsify", "Sparsify"], ["Sparsify needs 'target_sparsity'", UNDER.removeprefix("write ")]),
    "arguments beside a class": (["--sparsify", "{class_path: Sparsify, target_sparsity: 0.9}"], [BESIDE, UNDER]),
    "a target beside a schedule": ([S + "target_sparsity", "0.95"], ["target_sparsity finds lam itself", "--sparsify.lam null"]),
    "optimiser": (["--optimizer", "LBFGS"], ["ReweightedPenalty cannot work with LBFGS"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = WORDS[case]
    message = refused(capsys, "fit", "--config", "digits", *words)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) <= 2


def test_a_word_for_a_number_is_not_also_called_an_unknown_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(refused(capsys, "fit", "--config", "digits", "--sparsify.lam", "strong").splitlines()) == 1


FORM = "sparsify:\n  class_path: ReweightedPenalty\n"
FILES = {
    "empty": ("", ["must contain keys such as 'trainer' and 'sparsify', got None"]),
    "a list": ("- a\n- b\n", ["got ['a', 'b']"]),
    "a sentence": ("just text", ["got 'just text'"]),
    "an open bracket": ("trainer: [\n", ["mine.yaml is not YAML", "line 2"]),
    "a tab": ("\tx: 1", ["mine.yaml is not YAML", "line 1"]),
    "a picture": (b"\x89PNG\x00\xff", ["mine.yaml is not YAML", "0x89"]),
    "a number for the trainer": ("trainer: 3\n", ["mine.yaml: trainer must be a mapping of its arguments, got 3"]),
    "a list for the form": ("sparsify: [1]\n", ["mine.yaml: sparsify must be a mapping"]),
    "a list of arguments": (FORM + "  init_args: [1, 2]\n", ["sparsify.init_args must be a mapping of arguments, got [1, 2]"]),
    "a list deep down": ("trainer:\n  callbacks:\n  - {class_path: Timer, init_args: 3}\n", ["trainer.callbacks.0.init_args must be"]),
    "no penalty": (FORM, ["sparsify: ReweightedPenalty needs 'penalty'", LOG_SUM]),
    "no strength": (FORM + "  init_args: {penalty: {class_path: LogSum, init_args: {eps: 2.0}}}\n", ["ReweightedPenalty needs lam"]),
    "arguments of nothing": (
        "sparsify: {init_args: {lam: 1}}\n",
        ["sparsify: no class_path: write {class_path: ReweightedPenalty, init_args: {lam: 1}}"],
    ),
    "a target of nothing": (
        "sparsify: {target_sparsity: 0.8}\n",
        ["sparsify: no class_path: write {class_path: Sparsify, init_args: {target_sparsity: 0.8}}"],
    ),
    "a lambda": (
        FORM + "  init_args: {penalty: L1, lam: 'lambda s: 1e-3'}\n",
        ["sparsify.lam: must be a number, or a class_path (Constant, Cubic, LinearWarmup", 'got a mapping with the key "lambda s"'],
    ),
    "no target": ("sparsify: Sparsify\n", ["sparsify: Sparsify needs 'target_sparsity'", "--sparsify.target_sparsity 0.9"]),
    "a pattern for a list": (
        "sparsify: {class_path: Sparsify, init_args: {target_sparsity: 0.9, select: 'b1.*'}}\n",
        ["sparsify.select: must be a list such as ['b1.*'], got 'b1.*'"],
    ),
    "arguments beside a class": ("sparsify: {class_path: Sparsify, target_sparsity: 0.9}\n", [BESIDE, UNDER]),
    "init_arg": (
        "sparsify: {class_path: Sparsify, init_arg: {target_sparsity: 0.9}}\n",
        ["sparsify: 'init_arg' beside class_path: arguments of Sparsify belong under init_args", UNDER],
    ),
    "a callback's arguments beside its class": (
        "trainer: {callbacks: [{class_path: EarlyStopping, monitor: val_loss}]}\n",
        ["trainer.callbacks.0: 'monitor' beside class_path", "write {class_path: EarlyStopping, init_args: {monitor: val_loss}}"],
    ),
    "shrinks only": (FORM + "  init_args: {penalty: {class_path: Ridge, init_args: {c: 2.0}}, lam: 1.0}\n", ["only shrinks", "threshold"]),
    "two of a class": (
        "trainer:\n  callbacks:\n" + 2 * "  - {class_path: MagnitudePruning, init_args: {target_sparsity: 0.5}}\n",
        ["two callbacks are MagnitudePruning with the same select", "give each its own select"],
    ),
    "one callback for a list": (
        "trainer: {callbacks: {class_path: EarlyStopping}}\n",
        ["trainer.callbacks: EarlyStopping needs 'monitor'", "--trainer.callbacks.monitor VALUE"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "fit"])
@pytest.mark.parametrize("case", FILES)
def test_files(case: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = FILES[case]
    Path("mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    model = [] if verb == "check" else ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    message = refused(capsys, *(["check", "mine.yaml"] if verb == "check" else ["fit", "--config", "mine.yaml", *model]))
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 1


def test_another_callback_that_needs_a_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("sparsify: {class_path: Sparsify, init_args: {target_sparsity: 0.9}}\n", encoding="utf-8")
    message = refused(capsys, "check", "mine.yaml", "--sparsify", "AdaptiveMask")
    assert "sparsify: AdaptiveMask needs 'penalty'" in message
    words = message.partition("or --sparsify")[2].split()
    assert main(["check", "mine.yaml", "--sparsify", "AdaptiveMask", "--sparsify" + words[0], *words[1:]]) == 0


def test_a_model_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit")
    assert "'model' must be given: by --config RECIPE" in message
    assert "fit.model" not in message


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(WORDS) + len(FILES) > 50
