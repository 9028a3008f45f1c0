"""Measure what zeros are worth after training: latency, bytes and equality of each export. Writes docs/export.md from its records.

    python tests/benchmarks/exported.py --root data                    # trains LeNet-300-100 at 95, 98, 99 % zeros, then measures
    python tests/benchmarks/exported.py --only linear encoder          # some sections again
    python tests/benchmarks/exported.py --only --write docs/export.md  # the page, from the records

Latencies are medians of interleaved rounds in one process; "times faster" is the median ratio to the dense network of the same round
with its quartiles, beside the dense network against itself (A/A).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import nn

import lightning_sparse
from lightning_sparse import export
from lightning_sparse.cli import formats, main
from lightning_sparse.cli.opened import open_checkpoint
from lightning_sparse.export import latency, onnx_file, program
from lightning_sparse.export.program import relative_difference

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent.parent / "docs" / "export" / "records.json"
SECTIONS = ("lenet", "linear", "encoder")
RECIPE = "mnist/lenet_300_100_68x_pruning"
TARGETS = (0.95, 0.98, 0.99)
GOAL = {"zeros": 0.98, "batch": 256, "times": 2.0}
ARMS = {"csr": "all layers in CSR", "auto": "auto"}
VERSIONS = ("torch", "lightning", "onnxruntime", "onnx", "safetensors")


def timed(arms: dict[str, Callable[[], Any]], budget: float) -> dict[str, list[float]]:
    """Return {arm: [milliseconds, times faster, lower quartile, upper quartile]}."""
    with torch.inference_mode():
        found = latency.measure(arms, "dense", budget, (11, 201))
    return {name: [1000 * t.seconds, t.times_faster, t.low, t.high] for name, t in found.items()}


def zero_(module: nn.Module, zeros: float, blocks: int = 1) -> nn.Module:
    """Set the smallest weights of each matrix to zero; with ``blocks``, the blocks of the smallest norm."""
    with torch.no_grad():
        for weight in (p for p in module.parameters() if p.dim() == 2):
            norms = weight.square().unflatten(0, (-1, blocks)).unflatten(2, (-1, blocks)).sum((1, 3))
            kept = norms > norms.flatten().kthvalue(max(1, round(zeros * norms.numel()))).values
            weight.mul_(kept.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1))
    return module.eval()


def trained(target: float, folder: Path, root: str, epochs: int) -> Path:
    """Return the checkpoint of LeNet-300-100 at a share of zeros; train it if there is none."""
    place = folder / f"{target:g}"
    if not list(place.rglob("*.ckpt")):
        words = ["--config", RECIPE, "--data.root", root, "--sparsify.target_sparsity", f"{target}", "--trainer.max_epochs", f"{epochs}"]
        quiet = ["--trainer.logger", "false", "--report.pictures", "false", "--report.table", "false"]
        if main(["fit", *words, *quiet, "--trainer.default_root_dir", str(place)]):
            raise SystemExit("training failed")
    return next(place.rglob("*.ckpt"))


def lenet(folder: Path, root: str, epochs: int, budget: float) -> list[dict[str, Any]]:
    rows = []
    for target in TARGETS:
        saved = open_checkpoint(trained(target, folder, root, epochs), None, ["--data.root", root])
        matrices = [p for p in saved.module.parameters() if p.dim() == 2]
        zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
        table, inputs = export.Table(budget=0.3), program.sized(saved.inputs(), 256)
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            columns = [
                formats.dense(saved, place),
                formats.sparse(saved, "csr", 256, place / "net.pt2"),
                formats.onnx(saved, place / "net.onnx"),
            ]
            columns += [formats.compact(saved, place / "exact", None), formats.compact(saved, place / "half", "fp16")]
            kept = {one.title: formats.sizes(one.file) for one in columns}
            tested = {one.title: formats.metrics(saved, one)["test/accuracy"] for one in columns}
            differences = {one.title: formats.difference(saved, one, inputs) for one in columns[1:]}
            times, taken = {}, {}
            small = lightning_sparse.shrink(saved.module, program.sized(inputs, 2))
            export.to_onnx(small, place / "small.onnx", program.sized(inputs, 2))
            shrunk = {"shrunk": small, "shrunk, onnx": onnx_file.session(place / "small.onnx")}
            kept["shrunk"] = formats.sizes(formats.dense(replace(saved, module=small), place).file)
            tested["shrunk"] = saved.test(small)["test/accuracy"]
            differences["shrunk"] = relative_difference(small(*inputs).detach(), saved.module(*inputs).detach())
            for batch in formats.BATCHES:
                given = program.sized(inputs, batch)
                auto = export.to_sparse(saved.module, "auto", batch, table)
                taken[batch] = len(export.sparse_layers(auto))
                calls = {one.title: one.call for one in columns if one.call is not None} | {"auto": auto} | shrunk
                times[batch] = timed({title: formats.call(function, given) for title, function in calls.items()}, budget)
        row = {
            "target": target,
            "zeros": zeros,
            "latency": times,
            "auto": taken,
            "bytes": kept,
            "accuracy": tested,
            "difference": differences,
            "parameters": [sum(p.numel() for p in module.parameters()) for module in (saved.module, small)],
        }
        rows.append(row)
    return rows


def linear(budget: float) -> list[dict[str, Any]]:
    """One Linear layer of 1024 x 1024, whole matrices of random places and blocks of 32 x 32."""
    rows = []
    for blocks, layout in ((1, "csr"), (32, "bsr")):
        for share in (0.2, 0.1, 0.05, 0.02, 0.01):
            torch.manual_seed(0)
            layer = zero_(nn.Linear(1024, 1024), 1 - share, blocks)
            sparse = export.to_sparse(layer, layout)
            for batch in formats.BATCHES:
                x = torch.randn(batch, 1024)
                with torch.inference_mode():
                    difference = relative_difference(sparse(x), layer(x))
                times = timed({"dense": formats.call(layer, (x,)), layout: formats.call(sparse, (x,))}, budget)
                rows.append(
                    {
                        "layout": layout,
                        "share": share,
                        "batch": batch,
                        "times": times[layout],
                        "again": times["A/A"],
                        "difference": difference,
                    }
                )
    return rows


def encoder(budget: float) -> list[dict[str, Any]]:
    """Six encoder layers of width 384 (12 heads, 1536 neurons), the sizes of a small sentence encoder, 64 tokens, untrained."""
    rows = []
    for zeros in (0.9, 0.95):
        torch.manual_seed(0)
        network = nn.TransformerEncoder(nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True, activation="gelu"), 6)
        zero_(network, zeros)
        with tempfile.TemporaryDirectory() as name:
            onnx = Path(name) / "net.onnx"
            export.to_onnx(network, onnx, torch.randn(2, 64, 384))
            compact = export.save_compact(network, Path(name) / "compact").stat().st_size
            dense = sum(p.numel() * 4 for p in network.parameters())
            running, table = onnx_file.session(onnx), export.Table(budget=0.3)
            for batch in (1, 16):
                sparse = export.to_sparse(network, "auto", batch * 64, table)
                x = torch.randn(batch, 64, 384)
                with torch.inference_mode():
                    difference = relative_difference(sparse(x), network(x))
                arms = {"dense": network, "auto": sparse, "onnx": running}
                times = timed({title: formats.call(function, (x,)) for title, function in arms.items()}, budget)
                layouts = len(export.sparse_layers(sparse))
                row = {"zeros": zeros, "batch": batch, "latency": times, "auto": layouts, "difference": difference}
                rows.append(row | {"bytes": {"dense": dense, "compact": compact}})
    return rows


def faster(found: list[float]) -> str:
    return f"{found[1]:.1f} ({found[2]:.1f} to {found[3]:.1f})"


def lenet_table(rows: list[dict[str, Any]]) -> str:
    """Latency of LeNet-300-100: one line for each share of zeros and batch size."""
    lines = [
        "| zeros | batch | dense, ms | A/A | all layers CSR | auto (layers replaced) | shrunk | ONNX Runtime | ONNX Runtime, shrunk |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        for batch, found in row["latency"].items():
            auto = f"{faster(found['auto'])} ({row['auto'][batch]} of 3)" if row["auto"][batch] else "stays dense"
            cells = [f"{found['dense'][0]:.3f}", faster(found["A/A"]), faster(found["csr"]), auto]
            cells += [faster(found[name]) for name in ("shrunk", "onnx", "shrunk, onnx")]
            lines.append(f"| {100 * row['zeros']:.2f} % | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def size_table(rows: list[dict[str, Any]]) -> str:
    """Bytes, test accuracy and difference of outputs for each format of LeNet-300-100."""
    names = {"dense": "dense (`torch.save` of the weights)", "csr": "`--to csr` (program of torch.export)", "onnx": "`--to onnx`"}
    names |= {"compact": "`--to compact`", "compact fp16": "`--to compact --fp16`", "shrunk": "shrunk (`torch.save` of the weights)"}
    lines = ["| zeros | format | bytes | gzipped | times smaller | test accuracy | largest difference |", "|---" * 7 + "|"]
    for row in rows:
        whole = row["bytes"]["dense"][0]
        for title, text in names.items():
            size, packed = row["bytes"][title]
            difference = f"{row['difference'][title]:.1e}" if title in row["difference"] else ""
            cells = [f"{size:,}", f"{packed:,}", f"{whole / size:.1f}", f"{row['accuracy'][title]:.4f}", difference]
            lines.append(f"| {100 * row['zeros']:.2f} % | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def linear_table(rows: list[dict[str, Any]]) -> str:
    """Times faster of one layer: a line for each layout and share, a column for each batch size."""
    lines = ["| layout | non-zero | batch 1 | batch 32 | batch 256 |", "|---" * 5 + "|"]
    for layout, share in dict.fromkeys((row["layout"], row["share"]) for row in rows):
        cells = [faster(row["times"]) for row in rows if (row["layout"], row["share"]) == (layout, share)]
        lines.append(f"| {layout.upper()} | {100 * share:g} % | {' | '.join(cells)} |")
    low, high = min(row["again"][2] for row in rows), max(row["again"][3] for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            f"A/A: quartiles from {low:.2f} to {high:.2f} over all lines. Largest difference: {max(r['difference'] for r in rows):.0e}.",
        ]
    )


def encoder_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| zeros | batch | dense, ms | A/A | auto (matrices replaced) | ONNX Runtime, dense matrices | largest difference | compact file |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        found, size = row["latency"], row["bytes"]
        auto = f"{faster(found['auto'])} ({row['auto']} of 36)"
        smaller = f"{size['dense'] / size['compact']:.1f} times smaller"
        cells = [f"{found['dense'][0]:.1f}", faster(found["A/A"]), auto, faster(found["onnx"]), f"{row['difference']:.0e}", smaller]
        lines.append(f"| {100 * row['zeros']:.0f} % | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say whether the goal is met at 98 % zeros and batch 256, by all layers in CSR and by auto."""
    (row,) = [row for row in rows if row["target"] == GOAL["zeros"]]
    found = row["latency"][str(GOAL["batch"])]
    said = [f"{text} {faster(found[name])}, {'met' if found[name][1] >= GOAL['times'] else 'missed'}" for name, text in ARMS.items()]
    over = found["onnx"][0] / found["csr"][0]
    goal = f"The goal was at least {GOAL['times']:g} times at 98 % zeros and batch 256, in torch. Measured: {'; '.join(said)}."
    return f"{goal} All layers in CSR are {over:.1f} times faster than ONNX Runtime with dense matrices."


def page(record: dict[str, Any]) -> str:
    """Format the page."""
    template = Template((HERE / "exported_page.md").read_text(encoding="utf-8"))
    results = record["results"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return template.substitute(
        lenet=lenet_table(results["lenet"]),
        sizes=size_table(results["lenet"]),
        linear=linear_table(results["linear"]),
        encoder=encoder_table(results["encoder"]),
        verdict=verdict(results["lenet"]),
        versions=versions,
        threads=record["threads"],
        epochs=record["epochs"],
        recipe=RECIPE,
    )


def rounded(value: Any) -> Any:
    """Round floats to four digits, also inside containers; keys become strings."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS, help="sections to measure; none with no word")
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--folder", type=Path, default=Path("runs/exported"), help="where the networks are trained")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line of a table")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--write", type=Path, help="write the page there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "lenet": lambda: lenet(given.folder, given.root, given.epochs, given.seconds),
        "linear": lambda: linear(given.seconds / 3),
        "encoder": lambda: encoder(2 * given.seconds),
    }
    record: dict[str, Any] = json.loads(given.records.read_text(encoding="utf-8")) if given.records.exists() else {"results": {}}
    for section in given.only:
        record["results"][section] = rounded(measures[section]())
        record |= {"versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}}
        record |= {"threads": given.threads, "epochs": given.epochs}
        given.records.parent.mkdir(parents=True, exist_ok=True)
        given.records.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{section} measured", flush=True)
    if given.write:
        given.write.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    run()
