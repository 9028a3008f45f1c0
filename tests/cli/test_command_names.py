"""Names on the command line: a user's class, a folder of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sparse.cli import main, recipes
from lightning_sparse.cli.plot import read

SOURCE = """
from dataclasses import dataclass
from lightning_sparse.duality import Penalty

@dataclass(frozen=True)
class Laplace{number}(Penalty):
    scale: float
    examples = ({{"scale": 0.25}}, {{"scale": 4.0}})

    def omega(self, w):
        return w.abs() / self.scale

    def eta_hat(self, w):
        return w.abs() * self.scale
"""
WORDS = ["{}.Laplace{}", "{}.Laplace{}:", "class_path: {}.Laplace{}", "{{class_path: {}.Laplace{}}}"]


def test_a_users_class_is_drawn_with_its_first_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = []
    for number, word in enumerate(WORDS):
        name = f"my_penalty_{number}"  # a new module each time, because imported modules are cached
        Path(f"{name}.py").write_text(SOURCE.format(number=number), encoding="utf-8")
        words.append(word.format(name, number))
        assert read(words[-1]).scale == 0.25
        assert read(f"{{{name}.Laplace{number}: {{scale: 2}}}}").scale == 2
        assert read(f"Laplace{number}").scale == 0.25
    assert main(["plot", *words, "-o", "curves.png"]) == 0
    assert Path("curves.png").stat().st_size > 1000


def test_a_missing_class_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "no_such_file.Laplace"]) == 2
    assert "no_such_file" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["overlay", "overlay/"])
def test_a_folder_of_recipes_lists_what_is_under_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", word]) == 0
    printed = capsys.readouterr().out
    shown = [line for line in printed.splitlines() if line and not line.startswith(" ")]
    assert shown == [name for name in recipes.names() if name.startswith("overlay/")]
    assert printed.count("summary:") == len(shown) > 5


def test_a_recipe_by_name_is_a_path_and_a_misspelt_folder_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "overlay/adaptive_mask"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["recipes", "overlai"]) == 2
    assert "'overlay" in capsys.readouterr().err
