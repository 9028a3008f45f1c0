"""Bad recipes, arguments and checkpoints on the command line: exit code 2, the cause named, no file and no W&B run left."""

from __future__ import annotations

import copy
import errno
from pathlib import Path

import pytest
import torch

from lightning_sparse.cli import checkpoints, main
from lightning_sparse.cli.errors import UsageError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning with this torch
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI with this jsonargparse
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden"),
]
SHORT = ["--trainer.max_epochs", "2", "--data.batch_size", "400", "--report.dense_twin", "false", "--report.pictures", "false"]
SHORT += ["--report.table", "false"]
PLAIN = [*SHORT, "--trainer.logger", "false"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """What a command that must end with ``code`` says; never a traceback."""
    capsys.readouterr()
    assert main(words) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The same with exit code 2 and nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    message = answer(capsys, 2, *words)
    assert sorted(Path.cwd().rglob("*")) == before
    return message


S = "--sparsify."
SCALED = "{class_path: Scaled, init_args: {p: {class_path: LogSum, init_args: {eps: -1}}, t: 1}}"
WORDS = {
    "lam of text": ([S + "lam", "much"], ["sparsify.lam", "must be a number"]),
    "lam nan": ([S + "lam", ".nan"], ["lam must be a finite number > 0, got nan"]),
    "schedule": ([S + "lam", "LinearWarmup", S + "lam.lam", "1", S + "lam.share", "0"], ["share must lie in (0, 1], got 0.0"]),
    "schedule's name": ([S + "lam", "Cubicc"], ["no class 'Cubicc'", "'Cubic'"]),
    "schedule's order": ([S + "lam", "Cubic", S + "lam.lam", "1", S + "lam.begin", "0.8"], ["end must lie in (0.8, 1]"]),
    "p": ([S + "penalty", "Lp", S + "penalty.p", "2"], ["p must lie in (0, 2), got 2.0"]),
    "no p": ([S + "penalty", "Lp"], ["sparsify.penalty", "required: p"]),
    "prior": ([S + "penalty", "VariationalDropout", S + "penalty.prior", "log_unifrom"], ["closest: 'log_uniform'"]),
    "nested": ([S + "penalty", SCALED], ["eps must be a finite number > 0, got -1.0"]),
    "not separable": ([S + "penalty", "TopK", S + "penalty.density", "0.5"], ["needs a separable penalty, TopK"]),
    "a number for a penalty": ([S + "penalty", "3"], ["sparsify.penalty: no class '3'"]),
    "no penalty": ([S + "penalty", "null"], ["sparsify", "required: penalty"]),
    "select of text": ([S + "select", "layers.*"], ["sparsify.select", "must be a list"]),
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
    "the base class": (["--sparsify", "Sparsifier"], ["use ReweightedPenalty, AdaptiveProx or AdaptiveMask"]),
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
    "optimiser": (["--optimizer", "LBFGS"], ["ReweightedPenalty cannot work with LBFGS"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_words(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = WORDS[case]
    message = refused(capsys, "fit", "--config", "digits", *words)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) <= 2


FORM = "sparsify:\n  class_path: ReweightedPenalty\n"
FILES = {
    "empty": ("", ["must hold keys such as 'trainer' and 'sparsify', it holds None"]),
    "a list": ("- a\n- b\n", ["it holds ['a', 'b']"]),
    "a sentence": ("just text", ["it holds 'just text'"]),
    "an open bracket": ("trainer: [\n", ["mine.yaml is not YAML", "line 2"]),
    "a tab": ("\tx: 1", ["mine.yaml is not YAML", "line 1"]),
    "a picture": (b"\x89PNG\x00\xff", ["mine.yaml is not YAML", "0x89"]),
    "a number for the trainer": ("trainer: 3\n", ["mine.yaml: trainer must be a mapping of its arguments, got 3"]),
    "a list for the form": ("sparsify: [1]\n", ["mine.yaml: sparsify must be a mapping"]),
    "a list of arguments": (FORM + "  init_args: [1, 2]\n", ["sparsify.init_args must be a mapping of arguments, got [1, 2]"]),
    "a list deep down": ("trainer:\n  callbacks:\n  - {class_path: Timer, init_args: 3}\n", ["trainer.callbacks.0.init_args must be"]),
    "no penalty": (FORM, ["sparsify", "required: penalty"]),
    "no strength": (FORM + "  init_args: {penalty: {class_path: LogSum, init_args: {eps: 2.0}}}\n", ["lam is required with a penalty"]),
    "arguments of nothing": ("sparsify: {init_args: {lam: 1}}\n", ["sparsify", "required: penalty"]),
    "shrinks only": (FORM + "  init_args: {penalty: {class_path: Ridge, init_args: {c: 2.0}}, lam: 1.0}\n", ["only shrinks", "threshold"]),
    "one callback for a list": ("trainer: {callbacks: {class_path: EarlyStopping}}\n", ["trainer.callbacks", "required: monitor"]),
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


# -- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main(["fit", "--config", "digits", *PLAIN, "--trainer.default_root_dir", str(folder)]) == 0
    return next(folder.rglob("*.ckpt"))


def changed(whole: Path, key: str, change: object) -> str:
    """A copy of the file with the entry at a dotted key replaced, or deleted for None."""
    content = copy.deepcopy(torch.load(whole, weights_only=True))
    *path, last = [next(k for k in content["callbacks"] if "Reweighted" in k) if part == "FORM" else part for part in key.split("/")]
    inner = content
    for part in path:
        inner = inner[part]
    if change is None:
        del inner[last]
    else:
        inner[last] = change
    torch.save(content, "changed.ckpt")
    return "changed.ckpt"


CHANGED = {
    "no weights": ("state_dict", None, ["changed.ckpt: no checkpoint of a LightningModule", "not 'state_dict'"]),
    "no version": ("pytorch-lightning_version", None, ["no checkpoint that a Trainer wrote"]),
    "weights only": ("optimizer_states", None, ["lacks ['optimizer_states']", "save_weights_only=True"]),
    "another shape": ("state_dict/layers.1.weight", torch.ones(3, 3), ["of another model", "layers.1.weight (3, 3) against (300, 64)"]),
    "a missing weight": ("state_dict/layers.1.weight", None, ["of another model", "lacks layers.1.weight"]),
    "one weight more": ("state_dict/other.weight", torch.ones(3), ["of another model", "has besides other.weight"]),
    "our step": ("callbacks/FORM/step", "x", ["'step' must be a whole number >= 0, got 'x'"]),
    "our weights": ("callbacks/FORM/taken", [1], ["'taken' must be a dict of finite"]),
    "callbacks": ("callbacks", [1], ["'callbacks' must be a dict by state key, got [1]"]),
    "hyper_parameters": ("hyper_parameters", 3, ["'hyper_parameters' are no dict but 3"]),
    "a hyper_parameter": ("hyper_parameters/sizes", "x", ["hyper_parameters of --ckpt_path"]),
    "an object": ("extra", Path("x"), ["pathlib", "may run code when loaded"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_changed_checkpoints(case: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, change, expected = CHANGED[case]
    message = refused(capsys, "fit", "--config", "digits", *SHORT, "--ckpt_path", changed(whole, key, change))
    for part in expected:
        assert part in message


LATER = {
    "changed weights": ("state_dict/layers.1.weight", torch.ones(300, 64), ["changed.ckpt: the checkpoint keeps", "0 zeros there"]),
    "another optimiser": ("optimizer_states", [3], ["changed.ckpt cannot be loaded here"]),
    "no loops": ("loops", {}, ["changed.ckpt cannot be loaded here", "fit_loop"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_what_only_the_trainer_finds_out_is_one_line_too(case: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, change, expected = LATER[case]
    message = answer(capsys, 2, "fit", "--config", "digits", *PLAIN, "--ckpt_path", changed(whole, key, change))
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 1


def test_a_checkpoint_that_is_not_there(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(whole.with_name("epoch=1-step=7.ckpt"))
    assert f"closest: {str(whole)!r}" in refused(capsys, "fit", "--config", "digits", *SHORT, "--ckpt_path", other)
    assert "no checkpoint 'a.ckpt'" in refused(capsys, "test", "--config", "digits", "--ckpt_path", "a.ckpt")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_cut_file_and_a_flipped_bit_for_every_verb(verb: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = whole.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 4
    for name, content in (("cut", raw[:1000]), ("flipped", bytes(flipped)), ("empty", b""), ("text", b"hello world")):
        Path(f"{name}.ckpt").write_bytes(content)
        message = refused(capsys, verb, "--config", "digits", "--ckpt_path", f"{name}.ckpt")
        assert f"{name}.ckpt" in message
        assert "damaged" in message


def test_a_file_cut_at_any_of_20_places_is_named(whole: Path, tmp_path: Path) -> None:
    raw, path = whole.read_bytes(), tmp_path / "cut.ckpt"
    for i in range(20):
        path.write_bytes(raw[: i * len(raw) // 20])
        with pytest.raises(UsageError, match=r"cut\.ckpt.*damaged"):
            checkpoints.read(path)
    assert checkpoints.read(whole)["global_step"] == 6


def test_a_whole_file_is_resumed_and_tested(whole: Path) -> None:
    longer = [*PLAIN, "--trainer.max_epochs", "3", "--trainer.default_root_dir", "more"]
    assert main(["fit", "--config", "digits", *longer, "--ckpt_path", str(whole)]) == 0
    assert torch.load(next(Path("more").rglob("*.ckpt")), weights_only=True)["global_step"] == 9
    assert main(["test", "--config", "digits", "--trainer.logger", "false", "--ckpt_path", str(whole)]) == 0


# -- runs that go wrong -----------------------------------------------------------------------------------------------------

DATA = """
from lightning_sparse.examples.digits import Digits


class Spoiled(Digits):
    def setup(self, stage):
        super().setup(stage)
        self.parts["training"][0][500] = float("nan")


class Missing(Digits):
    def setup(self, stage):
        open("no_such_file.csv")


class Bug(Digits):
    def setup(self, stage):
        raise KeyError("a bug of the user's")
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_data", raising=False)


FAILURES = {
    "NaN in the data": (["--data", "own_data.Spoiled"], ["the loss is nan at optimiser step", "those before this batch"]),
    "a rate far too large": (["--model.lr", "1e30", "--trainer.max_epochs", "9"], ["the loss is nan at optimiser step"]),
    "a file of the user's": (["--data", "own_data.Missing"], ["FileNotFoundError", "no_such_file.csv"]),
}  # fmt: skip


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_run_says_so_in_one_line_with_exit_code_1(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = FAILURES[case]
    message = answer(capsys, 1, "fit", "--config", "digits", *PLAIN, *words)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.usefixtures("own_data")
def test_a_bug_in_the_users_code_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="a bug of the user's"):
        main(["fit", "--config", "digits", *PLAIN, "--data", "own_data.Bug"])


def test_a_full_disk_leaves_the_files_before_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.io import torch_io

    saved = []

    def save(content: object, path: object) -> None:
        saved.append(path)
        if len(saved) == 3:
            Path(str(path)).touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save(content, str(path))

    monkeypatch.setattr(torch_io, "_atomic_save", save)
    words = [
        "--trainer.max_epochs",
        "5",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--trainer.callbacks.save_top_k",
        "-1",
    ]
    message = answer(capsys, 1, "fit", "--config", "digits", *PLAIN, *words)
    assert "No space left on device" in message
    assert len(saved) == 3
    for path in saved[:2]:
        assert "state_dict" in torch.load(path, weights_only=True)
    assert main(["fit", "--config", "digits", *PLAIN, "--ckpt_path", str(saved[1]), "--trainer.max_epochs", "3"]) == 0


def test_a_form_that_meets_its_limits_in_training_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(capsys, 2, "fit", "--config", "digits", *PLAIN, "--trainer.max_epochs", "-1", "--trainer.max_steps", "-1")
    assert "give the Trainer max_epochs or max_steps" in message


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(WORDS) + len(FILES) + len(CHANGED) + len(LATER) + len(FAILURES) >= 60
