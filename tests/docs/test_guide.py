"""The guide's Python blocks and the notebooks run, page by page, and its commands name verbs and arguments that exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sparse.cli import _VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs/guide").glob("*.md"), ROOT / "docs/index.md"])
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def run(code: str, folder: Path) -> None:
    """Run code in a process of its own, from a folder."""
    (folder / "page.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    code = "\n\n".join(blocks(page, "python"))
    for package in re.findall(r"^# needs: pip install (\S+)$", code, flags=re.M):
        pytest.importorskip(
            package.replace("-", "_"), reason=f"the code of {page.name} needs {package}, which is in no extra of this package"
        )
    run(code, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_and_its_outputs_are_small(notebook: Path, tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)
    assert notebook.stat().st_size < 300_000
    run("\n\n".join("".join(cell["source"]) for cell in cells), tmp_path)


def test_most_pages_have_code() -> None:
    assert len(WITH_CODE) >= 8


def commands(page: Path) -> list[list[str]]:
    text = page.read_text(encoding="utf-8")
    found = [line for block in blocks(page, "sh") for line in block.splitlines()] + re.findall(r"`(lightning-sparse [^`]*)`", text)
    return [shlex.split(line) for line in found if line.startswith("lightning-sparse ")]


COMMANDS = [(page.stem, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words[1:4])}" for page, words in COMMANDS])
def test_a_command_names_a_verb_that_exists(page: str, words: list[str]) -> None:
    assert words[1] in _VERBS or words[1] == "VERB"


def test_the_commands_are_found() -> None:
    assert {words[1] for _, words in COMMANDS} >= {"fit", "check", "compare", "path", "sweep", "plot", "recipes"}
