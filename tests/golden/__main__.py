"""Golden runs: ``python tests/golden record`` writes the record, ``check`` repeats the runs and compares them.

Run it from the repository's root. Hashes are compared if machine and versions equal those of the record; otherwise the share of
zeros and the sum of squared weights are compared, because the last bits of a sum may differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from golden_record import PATH, compared, fingerprint, read, written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "check"])
    parser.add_argument("--only", default="", help="runs whose name 'method / setting' contains this")
    parser.add_argument("--record", type=Path, default=PATH, help="the file with the record")
    given = parser.parse_args()
    if given.verb == "record":
        count = written(given.record, given.only)
        print(f"{count} runs recorded in {given.record.name}: {fingerprint()}")
        return 0
    problems, count, exact = compared(read(given.record), given.only)
    print("\n".join(problems))
    print(f"{count - len(problems)} of {count} runs as recorded, {'bit by bit' if exact else 'by zeros and squares: another machine'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
