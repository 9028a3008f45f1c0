"""What tests/conftest.py refuses: files left in the root, names of tests that differ between processes, variables of an earlier test."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAVES = """
from pathlib import Path
import pytest

@pytest.fixture(scope="module")
def folder():
    Path("{name}").mkdir()

def test_before():
    pass

def test_leaves(folder):
    pass

def test_after():
    pass
"""
VARIABLES = """
import os
import pytest

@pytest.fixture(scope="module")
def service():
    os.environ["WANDB_SERVICE"] = "3-1-tcp"

def test_sets():
    os.environ["PL_GLOBAL_SEED"] = "0"

def test_has_a_service(service):
    assert "WANDB_SERVICE" not in os.environ

def test_finds_none():
    assert not {"PL_GLOBAL_SEED", "WANDB_SERVICE"} & set(os.environ)
"""
ADDRESSES = """
import pytest

@pytest.mark.parametrize("given", [object()], ids=repr)
def test_of_an_object(given):
    pass
"""


def run(pytester: pytest.Pytester, code: str) -> pytest.RunResult:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(code)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")


def test_the_one_test_that_leaves_a_folder_in_the_root_fails(pytester: pytest.Pytester) -> None:
    result = run(pytester, LEAVES.format(name="wandb"))
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_leaves*", "*left [[]'wandb'[]] in *write to tmp_path*"])


def test_caches_may_be_left(pytester: pytest.Pytester) -> None:
    run(pytester, LEAVES.format(name=".cache")).assert_outcomes(passed=3)


def test_a_seed_and_a_service_in_the_environment_do_not_reach_the_next_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "")  # so that this test's end restores it
    run(pytester, VARIABLES).assert_outcomes(passed=3)


def test_names_with_an_address_are_refused(pytester: pytest.Pytester) -> None:
    result = run(pytester, ADDRESSES)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*have an address in memory in their name; give them ids*test_of_an_object*"])
