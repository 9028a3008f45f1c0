"""Train what is missing in the records: python tests/benchmarks/race run --data FOLDER [options].

The same command again goes on where it was stopped. Every choice is made on the validation images; the test images are measured once,
at the end of each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from race import records
from race.problems import BUDGETS, PROBLEMS
from race.records import Record
from race.ways import DENSE, WAYS

TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99)


def plan(problems: list[str], budgets: list[str], targets: list[float], methods: list[str], seeds: list[int]) -> list[Record]:
    """Return the runs, seed by seed, so that an interrupted race has all methods; a dense run has no target."""
    every = [
        {"problem": problem, "budget": budget, "target": 0.0 if method == DENSE else target, "method": method, "seed": seed}
        for budget in budgets
        for seed in seeds
        for target in targets
        for problem in problems
        for method in methods
    ]
    return [*{records.key(run): run for run in every}.values()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="race run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with MNIST/raw and CIFAR10/train.npz")
    parser.add_argument("--weights", type=Path, help="a state_dict of ResNet-20 trained on CIFAR-10, from which finetune starts")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, help="all that have what they start from by default")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=["short"])
    parser.add_argument("--targets", nargs="+", type=float, default=[*TARGETS])
    parser.add_argument("--methods", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--records", type=Path, default=records.FILE)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the JSON of one run, in a process of its own
    given = parser.parse_args()
    if given.one:
        from race.one import train

        print(json.dumps(train(json.loads(given.one), given.data, given.weights)))
        return
    problems = given.problems or [name for name, problem in PROBLEMS.items() if given.weights or not problem.pretrained]
    done = {records.key(record) for record in records.read(given.records)}
    left = [one for one in plan(problems, given.budgets, given.targets, given.methods, given.seeds) if records.key(one) not in done]
    print(f"{len(done)} runs recorded, {len(left)} to train", flush=True)
    follow(left, given.data, given.weights, given.records, given.jobs)


def follow(left: list[Record], data: Path, weights: Path | None, file: Path, jobs: int) -> None:
    """Train the runs, ``jobs`` side by side, and add each record when its run ends."""
    running: list[tuple[Record, subprocess.Popen[str]]] = []
    waiting, total, started, ended = [*left], len(left), time.monotonic(), 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = waiting.pop(0)
                command = [sys.executable, str(Path(__file__).parent), "run", "--data", str(data), "--one", json.dumps(one)]
                command += ["--weights", str(weights)] if weights else []
                running.append((one, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)))
            time.sleep(0.2)
            for one, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((one, process))
                lines = process.stdout.read().splitlines() if process.stdout else []
                record = json.loads(lines[-1]) if process.returncode == 0 and lines else one | {"error": f"exit {process.returncode}"}
                records.add(record, file)
                ended += 1
                minutes = (time.monotonic() - started) / ended * (total - ended) / 60
                said = record.get("error") or f"validation {record['validation_error']:.2f}%, {record['seconds']:.0f} s"
                print(f"[{ended}/{total}, {minutes:.0f} min left] {' / '.join(map(str, records.key(one)))}: {said}", flush=True)
    finally:
        for _, process in running:
            process.terminate()
