"""The examples in each verb's help are commands that its parser accepts, and its YAML is YAML."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from typing import Any

import pytest
import yaml

from lightning_sparse.cli import _VERBS, main, plot
from lightning_sparse.cli.comparison import methods

HELPS = [[verb] for verb in _VERBS if verb not in ("fit", "validate", "test", "predict")] + [["shrink", "--max_drop", "0"]]
WITH_EXAMPLES = {"export", "compare", "path", "sweep"}


class Parsed(Exception):
    """Stops a verb once its words were accepted, and holds them."""


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "10000")  # because words are not to be wrapped
    with contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


def examples(text: str) -> list[list[str]]:
    return [shlex.split(found) for found in re.findall(r"Example: lightning-sparse (.+)", text)]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_examples_are_accepted(words, capsys, monkeypatch):
    text = help_of(words, capsys, monkeypatch)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse(self, args, namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    found = examples(text)
    assert bool(found) == (words[0] in WITH_EXAMPLES)
    for verb, *rest in found:
        assert verb == words[0]
        with pytest.raises(Parsed) as parsed:
            main([verb, *rest])
        assert parsed.value.args == ([],)  # no word is left that the verb does not know


def test_the_help_of_the_program_has_an_example_of_each_verb_that_the_verb_accepts(capsys, monkeypatch):
    main(["--help"])
    found = [shlex.split(words) for words in re.findall(r"\n {14}lightning-sparse (.+)", capsys.readouterr().out)]
    assert [verb for verb, *_ in found] == [*_VERBS]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse(self, args, namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    for verb, *rest in (words for words in found if [words[0]] in HELPS and words[1:]):
        with pytest.raises(Parsed) as parsed:
            main([verb, *rest])
        (left,) = parsed.value.args
        assert all("." in word for word in left[::2])  # overrides of a configuration, such as --sparsify.lam 3e-3


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_quoted_yaml_is_yaml(words, capsys, monkeypatch):
    quoted = re.findall(r"(?<!\w)'([^']*\{[^']*)'", help_of(words, capsys, monkeypatch))
    assert bool(quoted) == (words[0] in ("compare", "plot"))
    for word in quoted:
        assert isinstance(yaml.safe_load(word), dict)
        if words[0] == "plot":
            plot.read(word)
        elif word[0] != "{":
            assert methods.described(word, None, {"target_sparsity": 0.9})["init_args"]["target_sparsity"] == 0.9


def test_the_help_of_shrink_shows_the_arguments_with_a_goal_too(capsys, monkeypatch):
    text = help_of(["shrink"], capsys, monkeypatch)
    for flag in ("--allow_branches", "--max_drop", "--epochs", "--step", "--stages", "--monitor", "--search"):
        assert f"\n  {flag} " in text


def test_the_help_of_check_says_what_it_does(capsys, monkeypatch):
    text = help_of(["check"], capsys, monkeypatch)
    assert "--script SCRIPT" in text
    assert "train nothing" in text


def test_shrink_without_a_checkpoint_and_without_a_goal_names_both(capsys):
    with pytest.raises(SystemExit) as end:
        main(["shrink", "--config", "digits"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "CKPT; or give a goal, such as --max_drop 1" in said


def test_a_method_that_lacks_a_bracket_is_refused_with_their_numbers(capsys):
    assert main(["compare", "digits", "--methods", "AdaptiveProx: {penalty: {class_path: MCP, init_args: {c: 0.2}}"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("it has 3 { and 2 }")
