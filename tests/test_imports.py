"""Who may import whom: the package stays light, and the rooms point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lightning_sparse
import lightning_sparse.callbacks as callbacks

HEAVY = ("lightning", "pytorch_lightning", "torchvision", "torchmetrics", "wandb", "sklearn", "scipy", "matplotlib", "jsonargparse", "rich")
# from the ground up; a module may import its own floor and those before it. A package stands for all its modules; one that
# is not listed stands beside testing
FLOORS = [
    ["_checks", "_version"],
    [
        "duality",
        "numeric",
        "admissibility",
        "archive",
        "noise",
        "attach",
        "select",
        "schedules",
        "sample_gradients",
        "shards",
        "_curvature",
        "_labels",
        "curvature",
        "counts",
        "gates",
        "learned_noise",
        "structure",
        "tables",
    ],
    ["penalties", "mask_rules", "proximal"],
    ["metrics", "_penalty_contract", "testing", "plots"],
    ["callbacks"],
    ["conformance"],
    ["cli"],
    ["reproduction"],
    ["examples"],
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}


def files() -> dict[str, Path]:
    """Dotted name of each module, below ``lightning_sparse``, and its file."""
    found = {}
    for prefix, folder in (("", Path(lightning_sparse.__file__).parent), ("callbacks.", Path(callbacks.__file__).parent)):
        for path in folder.rglob("*.py"):
            name = prefix + path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
            if name != "__init__" and not name.startswith("recipes."):
                found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """First name below ``lightning_sparse`` of everything a file imports at run time, functions' insides aside."""
    names: set[str] = set()
    for node in _run_at_import(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("lightning_sparse.")}


def _run_at_import(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module and of its classes and conditions, not of its functions nor of ``if TYPE_CHECKING``."""
    found: list[ast.stmt] = []
    for node in body:
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not typing_only:
            found += [node, *_run_at_import(getattr(node, "body", []))]
    return found


def test_importing_the_package_and_its_quick_verbs_loads_nothing_heavy(tmp_path: Path) -> None:
    look = f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    code = f"import sys, lightning_sparse; {look}; from lightning_sparse.cli import main; main(['--help']); main(['recipes']); {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")] == ["loaded", "loaded"]
    assert "digits" in done.stdout


def test_no_import_points_upward() -> None:
    upward = []
    for name, path in files().items():
        own = name.split(".")[0]
        height = HEIGHT.get(own, HEIGHT["testing"])
        upward += [f"{name} imports {other}" for other in imported(path) if HEIGHT.get(other, -1) > height]
    assert upward == []


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    source = (
        "from lightning_sparse import callbacks\nimport lightning_sparse.cli.table\nclass A:\n    from lightning_sparse.plots import save\n"
    )
    (tmp_path / "probe.py").write_text(source + "def late():\n    import lightning_sparse.examples\n")
    assert imported(tmp_path / "probe.py") == {"callbacks", "cli", "plots"}


def test_lightning_stays_in_the_layers_that_may_know_it() -> None:
    knowing = {name.split(".")[0] for name, path in files().items() if _imports_lightning(path)}
    assert knowing <= {"callbacks", "cli", "conformance", "examples", "reproduction"}


def _imports_lightning(path: Path) -> bool:
    statements = _run_at_import(ast.parse(path.read_text()).body)
    modules = [alias.name for node in statements if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in statements if isinstance(node, ast.ImportFrom)]
    return any(module.split(".")[0] in ("lightning", "pytorch_lightning") for module in modules)
