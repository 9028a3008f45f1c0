"""The fast suite on the oldest or the newest releases that pyproject.toml admits: python .ci/versions.py oldest|newest

Each run makes a fresh virtual environment outside of the repository, installs the project there (for "oldest" with every
dependency at its lower bound) and prints what was installed. The ranges in pyproject.toml are those that this showed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# old releases on a newer Python deprecate each other; what this project says itself is shown by the main test run
QUIET = [word for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning") for word in ("-W", f"ignore::{kind}")]


def lower_bounds() -> list[str]:
    """Every dependency of pyproject.toml as ``name==lower bound``."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    if block is None:
        raise SystemExit("pyproject.toml has no dependencies")
    return [f"{name}=={bound}" for name, bound in re.findall(r'"([\w.\-\[\]]+)>=([\d.]+)', block[1])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["oldest", "newest"])
    which = parser.parse_args().which
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        tools = Path(folder) / "venv" / "bin"
        python = str(tools / "python")
        pins = lower_bounds() if which == "oldest" else []
        subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[test]", *pins], check=True)
        listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
        names = {re.split(r"[\[=]", pin)[0] for pin in lower_bounds()}
        print("installed:", *[line for line in listed.splitlines() if line.partition("==")[0] in names], flush=True)
        quiet = QUIET if which == "oldest" else []
        return subprocess.run([str(tools / "pytest"), "-q", "-m", "not slow", "-p", "no:cacheprovider", *quiet], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
