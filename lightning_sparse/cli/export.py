"""``lightning-sparse export CKPT --to FORMAT``: write files that use the zeros, and print what each is worth on this machine."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_sparse.cli import formats
from lightning_sparse.cli.errors import UsageError
from lightning_sparse.cli.formats import Format
from lightning_sparse.cli.opened import add_arguments, open_checkpoint, parsed
from lightning_sparse.cli.saved import Saved

FORMATS = ("auto", "csr", "bsr", "onnx", "compact", "2:4")
_ABOUT = (
    "Write the network of a checkpoint in formats that use its zeros, and print one table: bytes, bytes gzipped, latency at batch 1, 32 "
    "and 256 (with --fixed_batch: at --batch_size) beside the dense network in one run (A/A: the dense network against itself), test "
    "metrics before and after, largest difference of outputs. auto: CSR or BSR, layer by layer, where it is measured to be faster at "
    "--batch_size; csr, bsr: every layer "
    "that is at least half zero. All three write a program of torch.export. compact: bit mask and values. 2:4: on CUDA, in bfloat16, "
    "without a file. Formats that this network cannot have are named with the reason, and the others are written; the exit status is 2 "
    "if one was refused and none was written. Further arguments override the recipe as in fit. "
    "Example: lightning-sparse export net.ckpt --to csr onnx"
)


def run(verb: str, words: list[str]) -> int:
    """Write the files and print the table. Raises UsageError if no format can hold this network, with the reason of each."""
    parser = argparse.ArgumentParser(prog=f"lightning-sparse {verb}", description=_ABOUT)
    add_arguments(parser)
    parser.add_argument("--to", nargs="+", choices=FORMATS, required=True, help="one format or several, side by side in the table")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the files go (default: the checkpoint's folder)")
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="samples in the batch that auto chooses for (default: %(default)s)"
    )
    parser.add_argument("--fixed_batch", action="store_true", help="write files for batches of --batch_size alone, and measure there")
    parser.add_argument("--fp16", action="store_true", help="compact: round the values to 16 bits")
    args, overrides = parsed(parser, words)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}")
    if "2:4" in args.to and len(args.to) > 1:
        raise UsageError("2:4 is measured on the GPU and the other formats on the CPU: give --to 2:4 in a command of its own")
    saved = open_checkpoint(args.checkpoint, args.config, overrides, args.script)
    saved = saved.on_gpu() if "2:4" in args.to else saved
    folder = args.checkpoint.parent if args.out is None else args.out
    with tempfile.TemporaryDirectory() as scratch:
        columns, without, refused = list[Format](), list[str](), list[str]()
        for kind in dict.fromkeys(args.to):
            try:
                made = _written(kind, saved, folder, args)
            except UsageError as error:
                refused.append(f"{kind} not written: {error}" if len(args.to) > 1 else str(error))
                continue
            if isinstance(made, Format):
                columns.append(made)
            else:
                without.append(made)
        if refused and not columns:
            raise UsageError("\n".join([*refused, *without]))
        print("".join(f"{reason}\n" for reason in [*refused, *without]), end="")
        if columns:
            batches = (args.batch_size,) if args.fixed_batch else formats.BATCHES
            formats.show(saved, [formats.dense(saved, Path(scratch)), *columns], batches=batches)
    return 0


def _written(kind: str, saved: Saved, folder: Path, args: argparse.Namespace) -> Format | str:
    base, size = folder / saved.file.stem, args.batch_size
    dtype, fixed = "fp16" if args.fp16 else None, size if args.fixed_batch else None
    makers: dict[str, Callable[[], Format]] = {
        "onnx": lambda: formats.onnx(saved, base.with_name(f"{base.name}.onnx"), fixed),
        "compact": lambda: formats.compact(saved, base.with_name(f"{base.name}.compact.safetensors"), dtype),
        "2:4": lambda: formats.semi_structured(saved),
    }
    make = makers.get(kind)
    file = base.with_name(f"{base.name}.{kind}.pt2")
    return formats.sparse(saved, kind, size, file, args.fixed_batch) if make is None else make()
