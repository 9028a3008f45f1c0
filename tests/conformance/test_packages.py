"""The suite under ``pytorch_lightning``, and callbacks that support only one of Lightning's two packages."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden
from magnitude import Magnitude
from subjects import OTHERS, OURS, SILENT
from toys import several

from lightning_sparse import conformance, testing

CHECK = "both_packages_train_alike"


def under(package, *arguments):
    script = [sys.executable, "-W", "ignore", str(Path(__file__).parents[1] / "under.py"), *arguments]
    done = subprocess.run(script, env=os.environ | {"LIGHTNING_SPARSE_PACKAGE": package}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["package"] == package
    return {check: (verdict, reason) for check, verdict, reason in said["outcomes"]}


# learned noise, which uses the most of Lightning, and pruning; run others with `python tests/under.py NAME`
KINDS = ["VariationalDropout", "MagnitudePruning"]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_our_callbacks_conform_under_pytorch_lightning(name):
    outcomes = under("pytorch_lightning", name)
    assert outcomes.keys() == conformance.CHECKS.keys()
    silent = {check for check, (verdict, said) in outcomes.items() if verdict == "n/a" and said.startswith("Lightning")}
    silent |= {check for owner, check in SILENT if owner == name and outcomes[check][0] == "n/a"}
    assert {check: said for check, (verdict, said) in outcomes.items() if verdict != "pass" and check not in silent} == {}


@pytest.mark.slow
def test_the_suite_runs_under_the_package_that_is_named():
    assert under("pytorch_lightning", "MagnitudePruning", "fit_ends_with_true_zeros", CHECK) == {
        "fit_ends_with_true_zeros": ("pass", ""),
        CHECK: ("pass", ""),
    }


@pytest.mark.parametrize("name", several({name: name for name in OURS}, "ReweightedPenalty", "AdaptiveMask"))
def test_ours_train_alike_under_both_packages(name):
    assert conformance.outcome(OURS[name], CHECK).verdict == "pass"


def test_the_control_trains_alike_too():
    assert conformance.outcome(OTHERS["ModelPruning"], CHECK).verdict == "pass"


class OnePackage(Magnitude):
    """Calls a helper of one package on a module of the other."""

    def setup(self, trainer, module, stage):
        is_overridden("configure_model", module)


class OneModule(Magnitude):
    """Supports modules of one package only."""

    def prune(self, module):
        from lightning.pytorch import LightningModule

        if isinstance(module, LightningModule):
            super().prune(module)


@pytest.mark.parametrize(("mutant", "said"), [(OnePackage, "Expected a parent"), (OneModule, "no weight is zero")])
def test_a_callback_that_supports_one_package_fails(mutant, said):
    with pytest.raises(testing.ContractError, match=f"{CHECK}: .*{said}"):
        testing.check_callback(mutant(), only=[CHECK])


def test_checks_import_lightning_through_the_one_module_that_knows_both_packages():
    """Checks must use ``from lightning_sparse.conformance._lightning import ...`` to run under both packages."""
    odd = []
    for path in Path(conformance.__file__).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.name != "_lightning.py" else []
        imported = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        odd += [f"{path.name}: {module}" for module in imported if module.startswith("lightning.")]
    assert odd == []
