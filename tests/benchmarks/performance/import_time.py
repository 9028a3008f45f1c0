"""Compare the time of ``import lightning_sparse`` and ``import torch``: python tests/benchmarks/performance import_time

Fresh interpreters in turn, the user's and system's processor time of each (a busy machine stretches the wall clock);
the median and quartiles over rounds of the ratio to ``import torch`` in the same round, which is run twice (A/A).
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys

ARMS = {"torch": "import torch", "torch (A/A)": "import torch", "lightning_sparse": "import lightning_sparse"}


def seconds(code: str) -> float:
    """Measure the processor time of a new interpreter that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for code in ARMS.values():
        seconds(code)  # files into the cache
    times = [{name: seconds(code) for name, code in ARMS.items()} for _ in range(given.rounds)]
    print(f"python {platform.python_version()}, {given.rounds} rounds")
    print(f"{'import':20}{'seconds':>9}{'ratio':>8}{'25%':>8}{'75%':>8}")
    for name in ARMS:
        low, middle, high = statistics.quantiles([time[name] / time["torch"] for time in times], n=4)
        print(f"{name:20}{statistics.median(time[name] for time in times):9.2f}{middle:8.3f}{low:8.3f}{high:8.3f}")


if __name__ == "__main__":
    main()
