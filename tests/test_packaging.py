"""Content of the package, and commands and claims of the README."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sparse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = {"lightning_sparse": "lightning_sparse", "callbacks": "lightning_sparse.callbacks", "recipes": "lightning_sparse.recipes"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert set(listed) == found
    assert len(listed) == len(set(listed))


def test_every_module_and_recipe_lies_in_a_listed_package() -> None:
    for folder in FOLDERS:
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} needs an __init__.py to be packaged"


def test_the_installed_distribution_is_this_one() -> None:
    found = importlib.metadata.distribution("lightning-sparse")
    assert found.version == lightning_sparse.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    (command,) = [entry for entry in found.entry_points if entry.group == "console_scripts"]
    assert (command.name, command.value) == ("lightning-sparse", "lightning_sparse.cli:main")


def test_both_trees_are_marked_as_typed() -> None:
    import lightning_sparse.callbacks as callbacks

    for package in (lightning_sparse, callbacks):
        assert (Path(package.__file__ or "").parent / "py.typed").exists()


@pytest.mark.slow
def test_a_source_tree_finds_its_own_callbacks_and_recipes(tmp_path: Path) -> None:
    """At the root of a clone, the source folder hides the installed package."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = "from lightning_sparse import callbacks as c, recipes as r; print(c.__file__, *r.__path__, c.AdaptiveMask.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "callbacks" / "__init__.py"), str(tmp_path / "recipes"), "AdaptiveMask"]


def test_the_layer_refuses_to_be_imported_under_its_folder_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install" in done.stderr
    assert "lightning_sparse.callbacks" in done.stderr


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # because pytest imports them by name, without packages
    assert sorted(names) == sorted(set(names))


def test_the_licence_is_the_whole_unmodified_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "[name of copyright owner]" in text


def test_the_readme_has_two_commands_each_a_line_that_sets_itself_up() -> None:
    lines = [block.strip() for block in blocks("sh") if "venv" in block]
    assert len(lines) == 2
    for line in lines:
        assert "\n" not in line
        parts = [shlex.split(part) for part in line.split("&&")]
        assert parts[0] == ["python3", "-m", "venv", ".venv"]
        assert parts[1][:3] == [".venv/bin/pip", "install", "-q"]
        assert parts[2][0].startswith(".venv/bin/")
    assert README.count("bin/pytest") == 1  # because .ci/run uses this line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_example_prints_the_zeros_that_its_network_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    weights = [w for w in names["net"].parameters() if w.dim() == 2]  # type: ignore[attr-defined]
    assert round(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights), 4) == 0.9
    assert "90.0% of the weights are zero" in capsys.readouterr().out


def test_the_readme_is_one_that_a_reader_skims() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_other_commands_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_sparse.cli import main

    monkeypatch.chdir(tmp_path)
    words = [
        shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line.startswith("lightning-sparse")
    ]
    assert len(words) >= 4
    for _, verb, *rest in words:
        assert main(["check", rest[1], *rest[2:]] if verb == "fit" else [verb, *rest]) == 0


def test_the_readme_names_all_public_objects() -> None:
    from lightning_sparse import callbacks, mask_rules, penalties

    for module in (penalties, mask_rules, callbacks):
        for name in module.__all__:
            assert re.search(rf"\b{name}\b", README) or name == "Sparsifier", f"the README does not name {name}"


def test_contributing_quotes_the_real_penalty() -> None:
    quoted = blocks("python", (ROOT / "CONTRIBUTING.md").read_text())
    assert quoted == [(ROOT / "lightning_sparse" / "penalties" / "log_sum.py").read_text()], "paste log_sum.py into CONTRIBUTING.md again"


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "keepachangelog.com" in text
    assert "## [Unreleased]" in text or f"## [{lightning_sparse.__version__}]" in text
