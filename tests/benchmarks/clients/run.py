"""Use every callback in other packages, passed by each package's own argument.

    python tests/benchmarks/clients [--venv FOLDER] [--only "darts (N-BEATS)" ...] [--anew] [--write docs/clients.md]

Installs the programs into a virtual environment of their own (made where ``--venv`` says, by default in the folder for
temporary files; torch, Lightning and this package are those of the interpreter that runs the command), trains each with
every form on the CPU, on data made on the spot, and prints the table. Each run adds a line to ``--results``, and a
command that was interrupted goes on where it stopped; ``--anew`` first drops the lines of what is asked for (all, or
``--only`` some programs and ``--forms``). ``--table`` prints the table of the lines that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHARED = ("torch", "torchvision", "lightning", "pytorch-lightning", "numpy")  # from the interpreter that runs the command
WITH_DEPENDENCIES = [
    ["neuralforecast==3.3.0", "pytorch-forecasting==1.8.0", "lightly==1.6.0", "transformers==5.24.0", "timm==1.0.31"],
    ["peft==0.21.2", "torch_geometric==2.8.1"],
    ["darts==0.48.1", "pandas<3", "omegaconf", "einops", "scikit-base", "accelerate"],
]
# their bounds on torchmetrics (< 1.9) and setuptools (< 84) exclude what the others are installed with
ALONE = [["pytorch-tabular==1.2.0"], ["deeptab==2.1.0", "pretab", "properscoring", "scikit-optimize"]]
NAMES = ("darts", "neuralforecast", "pytorch-forecasting", "pytorch-tabular", "deeptab", "lightly", "timm")
NAMES += ("transformers", "peft", "torch_geometric")
CALLBACKS = ("ReweightedPenalty", "PenaltyLoss", "AdaptiveProx", "AdaptiveMask", "EtaTrick", "VariationalDropout", "HardConcrete")
CALLBACKS += ("MagnitudePruning", "SparsityMonitor")
SETTINGS = ("target", "target alone", "alone", "lam", "default")
EARLY, LATE = "restored an epoch before the target", "the target is missed"
GUESS = "no better than a constant answer"
MISSED = {EARLY, LATE}
GUESSED, TRAINED = 0.9, 0.5  # as shares of the error of a constant prediction: no better than it; much better


def install(folder: Path) -> Path:
    """Make the virtual environment unless it exists and is complete; return its interpreter."""
    if folder.resolve() == Path(sys.prefix).resolve() or (folder / "pyproject.toml").exists():
        raise SystemExit(f"{folder} is where this project itself is installed; name another folder with --venv")
    python, done = folder / "bin" / "python", folder / "installed.json"
    own, shared = sysconfig.get_path("purelib"), [f"{name}=={importlib.metadata.version(name)}" for name in SHARED]
    wanted = json.dumps([own, shared, *WITH_DEPENDENCIES, *ALONE])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(f"import site; site.addsitedir({own!r})\n", encoding="utf-8")
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{pin}\n" for pin in shared), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(pins)]
    for group in WITH_DEPENDENCIES:
        subprocess.run([*pip, *group], check=True)
    for group in ALONE:
        subprocess.run([*pip, "--no-deps", *group], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """Return versions of the programs and shared packages by name."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {(*NAMES, *SHARED)!r}}}))"
    said = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


def train(python: Path, results: Path, only: list[str] | None, forms: list[str] | None, jobs: int) -> list[str]:
    """Run what is missing in ``results``, one process per program with one thread. Return the programs whose process failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    listed = subprocess.run([str(python), "-m", "programs", "--list"], check=True, capture_output=True, text=True, cwd=HERE.parent).stdout
    asked = ["--forms", *forms] if forms else []

    def fails(name: str) -> bool:
        return subprocess.run([str(python), "-m", "programs", name, str(results), *asked], cwd=HERE.parent, env=environment).returncode != 0

    names = only or listed.splitlines()
    with ThreadPoolExecutor(jobs) as pool:
        return [name for name, failed in zip(names, pool.map(fails, names), strict=True) if failed]


def read(results: Path) -> list[dict[str, Any]]:
    """Read a results file, sorted by program, dense network first, then setting and callback."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=_place)


def _place(row: dict[str, Any]) -> tuple[str, int, int]:
    callback, _, setting = row["form"].partition(", ")
    return row["program"].lower(), SETTINGS.index(setting) if setting else -1, CALLBACKS.index(callback) if setting else -1


def forget(results: Path, only: list[str] | None, forms: list[str] | None) -> None:
    """Drop the rows of these programs and forms, all by default, from a results file."""
    lines = results.read_text(encoding="utf-8").splitlines()
    rows = [(json.loads(line), line) for line in lines]
    kept = [line for row, line in rows if (only and row["program"] not in only) or (forms and row["form"] not in forms)]
    results.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def faults(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """Return a run's shortcomings: an exception, a mismatch, a constant prediction, a missed target."""
    if row["outcome"] != "runs":
        return [f"stops: {row['outcome'][:160]}"]
    found = []
    if row["file_differs"]:
        found.append(f"the file differs from the module in {', '.join(row['file_differs'][:2])}")
    if row["loaded_differs"]:
        found.append(f"the loaded module differs in {', '.join(row['loaded_differs'][:2])}")
    if row["logged"] is not None and not row["restores"] and abs(row["logged"] - row["module"]) > 1e-6:
        found.append(f"{row['logged']:.4f} is logged")
    if row["form"].endswith(("target", "target alone")) and row["module"] < 0.795:
        found.append(EARLY if row["restores"] else LATE)
    if row["error"] > GUESSED * row["guess"] and dense["error"] < TRAINED * dense["guess"]:
        found.append(GUESS)
    if row["form"].startswith("SparsityMonitor") and row["error"] != dense["error"]:
        found.append("trains otherwise than without a callback")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Format one Markdown table per program."""
    parts = []
    for name in dict.fromkeys(row["program"] for row in rows):
        own = [row for row in rows if row["program"] == name]
        dense = next((row for row in own if row["form"] == "dense"), own[0])
        error = f"{dense['error']:.3f}" if dense["outcome"] == "runs" else "none"
        head = f"{dense['measure']}: dense {error}, a constant answer {dense['guess']:.3f}; {dense['steps']} steps"
        shares = [row["share_of_all"] for row in own if row["form"] == "MagnitudePruning, target" and row["outcome"] == "runs"]
        by = f", by `select={chosen}`" if (chosen := dense.get("select")) else ""
        head += "".join(f"; {share:.0%} of the parameters are selected{by}" for share in shares)
        parts.append(f"### {name}, a program on `{dense['package']}`\n\n{head}.\n")
        parts.append("| callback | setting | zeros logged | in the module | in the file | after load | error | what fell short |")
        parts.append("|---|---|--:|--:|--:|--:|--:|---|")
        parts += [_line(row, dense) for row in own if row["form"] != "dense"]
        parts.append("")
    return "\n".join(parts)


def _line(row: dict[str, Any], dense: dict[str, Any]) -> str:
    callback, _, setting = row["form"].partition(", ")
    said = "; ".join(faults(row, dense)).replace("|", "/")
    if row["outcome"] != "runs":
        return f"| {callback} | {setting} |  |  |  |  |  | {said} |"
    shares = (row["logged"], row["module"], row["file"], row["loaded"])
    figures = " | ".join("" if share is None else f"{share:.2%}" for share in shares)
    return f"| {callback} | {setting} | {figures} | {row['error']:.3f} | {said} |"


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Summarise the counts in one sentence."""
    known = [*rows]
    dense = {row["program"]: row for row in known if row["form"] == "dense"}
    tried = [row for row in known if row["form"] != "dense"]
    all_faults = [faults(row, dense[row["program"]]) for row in tried]
    kinds = {
        "stopped with an exception": sum(row["outcome"] != "runs" for row in tried),
        "had a file or a loaded module that differs from the module": sum(
            bool(row.get("file_differs") or row.get("loaded_differs")) for row in tried
        ),
        "ended no better than a constant answer": sum(GUESS in said for said in all_faults),
        "missed the target": sum(bool(MISSED & {*said}) for said in all_faults),
    }
    return f"Of {len(tried)} runs in {len(dense)} programs " + ", ".join(f"{count} {what}" for what, count in kinds.items()) + "."


def misses(rows: list[dict[str, Any]]) -> str:
    """List the runs with shortcomings."""
    dense = {row["program"]: row for row in rows if row["form"] == "dense"}
    found = [(row, faults(row, dense[row["program"]])) for row in rows if row["form"] != "dense"]
    return "\n".join(f"- {row['program']}, {row['form']}: {'; '.join(said)}" for row, said in found if said) or "- none"


def page(rows: list[dict[str, Any]], found: dict[str, str]) -> str:
    """Format the page."""
    template = Template((HERE / "page.md").read_text(encoding="utf-8"))
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    return template.substitute(versions=listed, summary=summary(rows), misses=misses(rows), tables=table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "lightning-sparse-clients")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of runs.jsonl and versions.json")
    parser.add_argument("--only", nargs="*", help="names of programs; all by default")
    parser.add_argument("--forms", nargs="*", help="such as 'AdaptiveMask, lam'; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="programs that run side by side")
    parser.add_argument("--anew", action="store_true", help="first forget the recorded runs of what is asked for")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", type=Path, help="write the page there")
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    runs, known = given.results / "runs.jsonl", given.results / "versions.json"
    if not given.table:
        python = install(given.venv)
        if given.anew and runs.exists():
            forget(runs, given.only, given.forms)
        known.write_text(json.dumps(versions(python), indent=1) + "\n", encoding="utf-8")
        failed = train(python, runs.resolve(), given.only, given.forms, given.jobs)
        if failed:
            raise SystemExit(f"the processes of {', '.join(failed)} failed; what they had run is kept: mend that and run the command again")
    rows = read(runs)
    print(table(rows), summary(rows), sep="\n")
    if given.write:
        given.write.write_text(page(rows, json.loads(known.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
