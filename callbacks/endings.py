"""Say how a run has ended: goals that it has not met, the zeros by lam and by rank, and how to use them."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_sparse import counts, elementwise, reach
from lightning_sparse.callbacks import best
from lightning_sparse.callbacks.form import SparsityCallback, peers_of
from lightning_sparse.callbacks.options import Options
from lightning_sparse.callbacks.user_warnings import rank_zero_note, rank_zero_warn
from lightning_sparse.schedules import FEWEST, Constant
from lightning_sparse.scores import LAMP
from lightning_sparse.step import Strength
from lightning_sparse.structure import Columns, Coupled
from lightning_sparse.support import Support

FEW = 0.05  # share of zeros below which a run with lam > 0 is warned of
TRIAL = 100  # optimiser steps below which a run may be only a trial
COLLAPSED = 30  # a parameter left with one weight is reported if the share of all weights that is left is so many weights of it
EMPTY = 0.0005  # share of the selected weights that are left, below which the network is reported as empty
FEW_GROUPS = 8  # a set of groups left with one is reported if the share of all weights that is left is so many of it
ROUNDED = 8  # lightning_sparse.shrink keeps a multiple of so many groups of an axis, by default
MASK = 1 / 32  # size of a compact file's bit mask, relative to the weights in float32: with fewer zeros the file is not smaller


# -- goals -----------------------------------------------------------------------------------------------------------------


def unreached(options: Options, support: Support, strength: Strength) -> list[str]:
    """Describe the goals that the run has not met, one phrase each; of a frozen support only a target that it misses."""
    if support.is_frozen:
        return short_of_target(options, support, strength)
    if options.target_sparsity is not None:
        return [f"{support.share_of_zeros():.2%} of the selected weights are zero, target_sparsity is {options.target_sparsity:g}"]
    at = round(strength.total * (1 - options.freeze)) if options.freeze else 0
    return [f"its support was to be frozen at step {at} (freeze={options.freeze:g}), so nothing was fine-tuned"] if options.freeze else []


def short_of_target(options: Options, support: Support, strength: Strength) -> list[str]:
    """Describe the share of zeros of a support that was chosen for the target and has fewer zeros; empty if it has enough."""
    target = options.target_sparsity
    share = None if target is None or strength.asked is not None else reach.missing(support, target)
    return [] if share is None else [f"{share:.2%} of the selected weights are zero and can be, target_sparsity is {target:g}"]


def schedule_left(options: Options, support: Support, strength: Strength) -> list[str]:
    """Describe how far lam is from the end of its schedule; empty at the end, and for pruning, whose schedule is its ramp."""
    end, constant = strength.schedule.lam, isinstance(strength.schedule, Constant)
    if support.is_frozen or options.target_sparsity is not None or constant or strength.lam >= end * (1 - 1e-6):
        return []
    return [f"lam is {strength.lam:.3g}, its schedule ends at {end:g}"]


def warn_target_missed(options: Options, strength: Strength, missed: list[str], due: float, pruned: Support | None) -> None:
    """Warn of the goals that a run that ended early ``missed``; log instead that it was ``pruned`` to its target."""
    text = f"training ended at step {strength.step} of {strength.total:g}, before {options.form} had finished: {'; '.join(missed)}"
    if pruned is not None:
        rank_zero_info(
            f"{text}. finish='prune' has removed the lowest ranks, so that {pruned.share_of_zeros():.2%} are zero: once and without "
            "fine-tuning. The metrics logged so far and the checkpoints saved so far are of the network before: validate and save again"
        )
        return
    step = math.ceil(strength.total * due)
    later = f"Train to step {step} at least (later EarlyStopping, longer max_time), or give the Trainer a smaller max_epochs or max_steps"
    rank_zero_warn(
        f"{text}. {later}" + ("" if options.target_sparsity is None else "; finish='prune' cuts to the target wherever training ends")
    )


def warn_few_zeros(options: Options, support: Support, strength: Strength, settings: Mapping[str, Any], movement: str) -> None:
    """Warn if lam > 0 has made hardly any zeros; only log it for a run of a few steps, which may be a trial.

    ``movement`` describes how far the method's own parameters have moved.
    """
    if strength.lam <= 0 or options.target_sparsity is not None or options.threshold == 0 or not strength.step:
        return
    zeros, names = support.share_of_zeros(), support.weights.parameters
    if zeros >= FEW:
        return
    keep = counts.mean(support.keep_probability(name) for name in names)
    name = "kl_weight" if "kl_weight" in settings else "lam"
    own = settings.get("learned_lr") or "the weights' own"
    rates = f"learned_lr (now {own})" if "learned_lr" in settings else "the learning rate"
    notify = rank_zero_warn if strength.step >= TRIAL else rank_zero_note
    notify(
        f"{options.form} has set {zeros:.2%} of the selected weights to zero in {strength.step} optimiser steps at "
        f"{name}={strength.lam:.3g}: the mean keep probability is {keep:.3g}, and a weight counts as zero below tol={options.tol:g}"
        f"{movement}. Raise {name} or {rates}, train longer, or give target_sparsity in place of {name}, which finds it and removes the "
        "missing weights by rank"
    )


def warn_untrained(options: Options, batches: int) -> None:
    """Warn of a fit whose optimisers never stepped."""
    rank_zero_warn(
        f"{options.form}: no optimiser step has changed the selected weights in {batches} batches, so its zeros are those of a network "
        "that was not trained. Return the loss from training_step; in manual optimisation call step() of self.optimizers()"
    )


def warn_no_training(options: Options, support: Support, trainer: Trainer) -> None:
    """Warn of a fit that trained no step, if its zeros are not those of the target: resumed at or beyond its end, or with no batches."""
    target, step = options.target_sparsity, trainer.global_step
    share = None if target is None else reach.missing(support, target)
    if share is None:
        return
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps, "limit_train_batches": trainer.limit_train_batches}
    given = ", ".join(f"{name}={value}" for name, value in limits.items() if name != "limit_train_batches" or not value)
    why = f"because the checkpoint is of epoch {trainer.current_epoch} and step {step}, and" if step else "with"
    rank_zero_warn(
        f"{options.form}: this fit trained no step, {why} {given}. {share:.2%} of the selected weights are zero, target_sparsity is "
        f"{target:g}. Give the Trainer {'a larger max_epochs or max_steps' if step else 'epochs, steps, time and batches to train on'}"
    )


def warn_new_length(options: Options, support: Support, strength: Strength, planned: float | None) -> None:
    """Warn if a resumed run has another number of steps than was planned when its state was written."""
    if planned is None or planned == strength.total or not math.isfinite(strength.total):
        return
    length = f"for {strength.total:g} optimiser steps in all, not {planned:g}"
    if support.is_frozen:
        rank_zero_warn(
            f"{_named(options)} continues {length}, and its support is frozen already: the steps from {strength.step} on fine-tune the "
            f"same {1 - support.share_of_zeros():.2%} of the weights, without penalty or noise. To choose new zeros, load the weights "
            "into the module and fit it with a new Trainer without ckpt_path"
        )
    elif options.freeze or not strength.is_constant:
        rank_zero_info(f"{_named(options)} continues {length}: its shares (freeze, warm-up, ramp) are of the new length")


def _named(options: Options) -> str:
    """Return the callback's class, with its selection, which tells several apart."""
    return options.form if options.select is None else f"{options.form} (select={options.select})"


def share_at_start(support: Support) -> float:
    """Return the share of the selected weights that are zero in matrices; vectors, such as biases, start at zero as a rule."""
    found = counts.count_zeros({name: w for name, w in support.weights.all_live().items() if w.dim() > 1})
    size = sum(parameter.numel() for parameter in counts.distinct(support.weights.parameters).values())
    return sum(zeros for zeros, _ in found.values()) / max(size, 1)


def tell_parts(options: Options, support: Support, strength: Strength, before: float) -> None:
    """Log, once the support is frozen, its zeros and how many lam made and the rank removed; warn if the target is not met.

    ``before`` is the share of zeros before it was frozen.
    """
    target = strength.target
    if target is None:
        return
    share, short = support.share_of_zeros(), reach.missing(support, target.target) is not None
    by_rank = min(target.ranked + max(share - before, 0.0), share)
    began = min(target.began, share - by_rank)  # because some may have grown since
    first = f"{began:.2%} of the weights have been zero from the start on, " if began else ""
    by_lam = share - by_rank - began
    form = _named(options)
    parts = (
        f"at step {strength.step}: {first}lam (now {strength.lam:.3g}) brought {by_lam:.2%} of the weights to zero, {by_rank:.2%} were "
        f"removed by rank along the ramp ({support.score!r}), {share:.2%} in all"
    )
    if strength.step < FEWEST and by_lam + by_rank > FEW:
        parts += f". {strength.step} steps are few: a network recovers better from many small cuts in a longer run"
    if short:
        rank_zero_warn(f"{form} does not meet target_sparsity={target.target:g} {parts}. No more can be removed: give a smaller target")
    else:
        rank_zero_info(f"{form} meets target_sparsity={target.target:g} {parts}")


def warn_collapsed(options: Options, support: Support, strength: Strength, settings: Mapping[str, Any]) -> None:
    """Warn of a network that is left with hardly any weight, of parameters with a single one, and of sets of groups with a single group.

    Without a target it is only logged for a run of a few steps, which may be a trial.
    """
    found, groups = counts.count_zeros(support.weights.parameters, support.all_zeros()), support.groups_left(support.weights.parameters)
    size, zeros = sum(number for _, number in found.values()), counts.share(found)
    target = options.target_sparsity
    notify = rank_zero_warn if target is not None or strength.step >= TRIAL else rank_zero_note
    name = "kl_weight" if "kl_weight" in settings else "lam"
    less = f"a smaller {name} (now {strength.lam:.3g}), or target_sparsity in its place" if target is None else "a smaller target_sparsity"
    if size and 1 - zeros < EMPTY:
        few = f"{round(size * (1 - zeros))} of {size} selected weights"
        notify(f"{options.form} has left {few}: the network passes on next to nothing. Give {less}")
        return
    share = 1 - (zeros if target is None else target)
    left = [name for name, (gone, number) in found.items() if number - gone <= 1 and number * share >= COLLAPSED]
    every = all(kept <= 1 for kept, _ in groups.values())
    many = {axis: number * (1 if every else share) >= FEW_GROUPS for axis, (_, number) in groups.items()}
    alone = {axis: number for axis, (kept, number) in groups.items() if kept <= 1 and many[axis]}
    most = 1.0 if target is None else target  # because least_kept is for a target, and at most 1 - target
    dead = "these layers pass on next to nothing. Give "
    if left:
        score = "" if isinstance(support.score, LAMP) else ", score=scores.LAMP()"
        floor = "" if most > 0.99 else f"least_kept=0.01{score}, which keeps some weights of every layer, or "
        notify(f"{options.form} has left at most one weight of {left[:5]}: {dead}{floor}{less}")
    if alone:
        least = max(0.05, math.floor(200 / min(alone.values())) / 100)  # which keeps two groups, rounded up
        floor = "" if least > 1 - most else f"least_kept={least:g}, which keeps two groups of each or more, or "
        named = ", ".join(f"{axis} ({number})" for axis, number in list(alone.items())[:5])
        notify(f"{options.form} has left one group of each of {named}: {dead}{floor}{less}")


# -- after training --------------------------------------------------------------------------------------------------------


def say_what_next(trainer: Trainer) -> None:
    """Log one line for all sparsity callbacks: the share of zeros, the checkpoint, and how to use the zeros."""
    peers = peers_of(trainer)
    found = counts.count_zeros({name: weight for peer in peers for name, weight in peer.parameters.items()})
    zeros, size = counts.share(found), sum(number for _, number in found.values())
    file, holds = _file(trainer, peers, zeros)
    report = _report(file, trainer.lightning_module) if file and not holds else ""
    use = _use(peers, zeros, trainer.lightning_module)  # on every rank, because it gathers
    step = f"; next: {report or use}" if report or use else ""
    names = " and ".join(dict.fromkeys(peer.options.form for peer in peers))
    saved = holds or (f"; checkpoint {file}" if file else "")
    rank_zero_info(f"{names}: {zeros:.2%} of {size} selected weights are zero{saved}{step}")


def _file(trainer: Trainer, peers: Sequence[SparsityCallback], zeros: float) -> tuple[str, str]:
    """Return the best or else the last checkpoint, and text for the line if it has fewer zeros than the network, else an empty one."""
    keeper = trainer.checkpoint_callback
    files = [file for file in (getattr(keeper, f"{which}_model_path", "") for which in ("best", "last")) if file]
    if not files or not trainer.is_global_zero:
        return "", ""
    shares = {file: _share_in_file(file, peers) for file in files}
    full = [file for file, share in shares.items() if share is None or share >= zeros - best.rounding(list(peers))]
    if full:
        return full[0], ""
    kind = "best" if getattr(keeper, "monitor", None) else "latest"
    waits = any(peer.target_sparsity is not None for peer in peers) and kind == "best" and not best.is_guarded(trainer)
    wait = "; add BestAfterTarget() to the callbacks, which counts scores only once the target is met" if waits else ""
    holds = f"the {kind} checkpoint {files[0]} was saved before that and holds {shares[files[0]]:.2%}"
    return files[0], f"; {holds}; trainer.save_checkpoint(path) saves this network{wait}"


def _share_in_file(file: str, peers: Sequence[SparsityCallback]) -> float | None:
    """Return the share of zeros of the selected weights in a checkpoint; None for a file that is not here or not of these weights."""
    if not Path(file).is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        held = {name: state[name] for peer in peers for name in counts.distinct(peer.parameters)}
        return counts.share(counts.count_zeros(held))
    except Exception:  # a file of another kind, or with objects that weights_only refuses: the line is then about the network alone
        return None


def _report(file: str, module: nn.Module) -> str:
    """Return the command that reports on a checkpoint; empty where it would not know the module.

    The configuration beside the file, or above its folder, names the module's class; a script with a fixed class is named itself.
    """
    folder, script = Path(file).parent, _script()
    found = next((place / "config.yaml" for place in (folder, folder.parent) if (place / "config.yaml").is_file()), None)
    try:
        tree = yaml.safe_load(found.read_text(encoding="utf-8")) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # a file that is being written by another rank, or not of a run
        return ""
    model = tree.get("model") if isinstance(tree, dict) else None
    name = model.get("class_path") if isinstance(model, dict) else model
    if isinstance(name, str):
        return f"lightning-sparse report {file}" if name.rpartition(".")[2] == type(module).__name__ else ""
    alone = found is not None or len(sys.argv) == 1  # with arguments, the command would not know which are its own
    return f"lightning-sparse report {file} --script {shlex.quote(script)}" if script and alone else ""


def _script() -> str:
    """Return the path of the user's script; empty in a notebook, and for a module that was started by its name."""
    script, main = Path(sys.argv[0]), sys.modules.get("__main__")
    is_script = script.suffix == ".py" and script.is_file() and getattr(main, "__spec__", None) is None
    return sys.argv[0] if is_script and not {"site-packages", "dist-packages"} & set(script.parts) else ""


def _use(peers: Sequence[SparsityCallback], zeros: float, module: nn.Module) -> str:
    """Return the call in Python that makes use of a share of zeros, and what it does; empty if there are too few."""
    whole = (nn.Embedding, nn.RNNBase)  # whose rows cannot be removed
    fixed = {id(weight) for layer in module.modules() if isinstance(layer, whole) for weight in layer.parameters(recurse=False)}
    weights = [weight.detach() for peer in peers for weight in peer.parameters.values() if id(weight) not in fixed]
    coupled = [peer for peer in peers if isinstance(peer.options.structure, (Columns, Coupled))]
    groups = [pair for peer in coupled for pair in peer.groups_left().values()]
    if any(_kept(left, number) < number for left, number in [*groups, *map(_rows_left, weights)]):
        return "lightning_sparse.shrink(module, x, verbose=True) measures what removing zero rows gains"
    if zeros > MASK:
        return "lightning_sparse.export.save_compact(module, path) writes a file without the zeros"
    return ""


def _kept(left: int, number: int) -> int:
    """Return how many groups of an axis stay in a shrunk network, of which ``left`` are not zero."""
    return min(-(-max(left, 1) // ROUNDED) * ROUNDED, number)


def _rows_left(weight: Tensor) -> tuple[int, int]:
    """Return (outputs of a layer that have weights left, outputs); of a weight split over processes this one's part is counted."""
    part = elementwise.local_part(weight)
    if part.dim() < 2 or not part.numel():
        return 0, 0
    return int((part.flatten(1) != 0).any(1).sum()), len(part)
