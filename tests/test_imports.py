"""Importing the package is fast, and import contracts detect forbidden imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import walk

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "pytorch_lightning", "torchvision", "torchmetrics", "wandb", "sklearn", "scipy", "matplotlib", "jsonargparse", "rich")


@pytest.mark.slow  # starts a process
def test_importing_the_package_and_its_quick_verbs_loads_nothing_heavy(tmp_path: Path) -> None:
    look = f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    code = f"import sys, lightning_sparse; {look}; from lightning_sparse.cli import main; main(['--help']); main(['recipes']); {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")] == ["loaded", "loaded"]
    assert "digits" in done.stdout


def contracts(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import contracts of pyproject.toml on the installed package in ``folder``."""
    call = "sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    code = f"import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; {call}"
    command = [sys.executable, "-c", code, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_contracts_hold_and_notice_what_they_forbid(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    package = tmp_path / "lightning_sparse"
    shutil.copytree(ROOT / "lightning_sparse", package)
    shutil.copytree(ROOT / "callbacks", package / "callbacks")
    done = contracts(tmp_path)
    assert done.returncode == 0, done.stdout
    forbidden = {
        "duality.py": "\n\ndef late() -> None:\n    from lightning_sparse import counts\n",  # in a function
        "numeric.py": "\nif TYPE_CHECKING:\n    from lightning.pytorch import Trainer\n",  # for a type checker
        "select.py": "\nfrom lightning_sparse.elementwise import pieces\n",  # of a private module
    }
    for name, line in forbidden.items():
        text = (package / name).read_text(encoding="utf-8")
        (package / name).write_text(text + line, encoding="utf-8")
        done = contracts(tmp_path)
        (package / name).write_text(text, encoding="utf-8")
        assert done.returncode == 1, name
        assert f"lightning_sparse.{name.removesuffix('.py')}" in done.stdout.split("Broken contracts")[1]


def test_no_modules_import_each_other_and_a_cycle_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert walk.cycles() == []
    names = {name: f"lightning_sparse.{name}" for name in ("a", "b", "c")}
    for name, text in {
        "a": "if TYPE_CHECKING:\n    from lightning_sparse import b\n",
        "b": "def late():\n    from lightning_sparse.c import one\n",
        "c": "import lightning_sparse.a\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(walk, "modules", lambda: {names[name]: tmp_path / f"{name}.py" for name in names})
    assert walk.cycles() == [[*names.values()]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", walk.METHODS)
def test_a_training_step_enters_few_files(name: str) -> None:
    torch.manual_seed(0)
    assert walk.walk(walk.METHODS[name]()).files <= (11 if name == "VariationalDropout" else 10)  # its penalty is a table


@pytest.mark.slow  # starts a process
def test_names_that_are_imported_late_are_listed() -> None:
    """For completion in a notebook."""
    command = "import lightning_sparse; print(set(lightning_sparse.__all__) - set(dir(lightning_sparse)))"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout == "set()\n"
