"""The house's rules: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Arrows run down only; a folder may import from folders of a higher number, never its own level's siblings.
FLOORS: dict[str, float] = {
    "ict_fast.__main__": 0,
    "ict_fast.cli": 0,
    "ict_fast.commands": 0,
    "ict_fast.ablation": 0,
    "ict_fast.doctor": 0,
    "ict_fast.results": 0,
    "ict_fast.training": 1,
    "ict_fast.evaluation": 1.5,  # the training measures its model with it
    "ict_fast.planning": 1.5,  # and asks it whether a micro-batch fits
    "ict_fast.report": 1,
    "ict_fast.interop": 1,
    "ict_fast.consistency": 2,
    "ict_fast.evaluate_command": 2,
    "ict_fast.networks": 3,
    "ict_fast.data": 3,
    "ict_kernels": 4,
    # What everybody may use, and what uses nobody: configuration, errors, files.
    "ict_fast.checkpoint": 4,
    "ict_fast.presets": 4,
    "ict_fast.children": 5,
    "ict_fast.config": 5,
    "ict_fast.durable": 5,
    "ict_fast.hardware": 5,
    "ict_fast.interruption": 5,
    "ict_fast.locks": 5,
    "ict_fast.restricted_unpickler": 5,
    "ict_fast.screen": 5,
    "ict_fast.errors": 6,
    "ict_fast.version": 6,
    "ict_fast.torchrun": 6,
}


def _imports(path: Path) -> list[str]:
    """Modules that a file imports, those for type checking apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return found


def _package(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "ict_kernels" else ".".join(parts[:2])


def _sources() -> list[tuple[str, Path]]:
    files = [(path, path.relative_to(ROOT)) for path in (ROOT / "ict_fast").rglob("*.py")]
    return [(".".join(relative.with_suffix("").parts), path) for path, relative in files]


def test_arrows_run_down_only() -> None:
    wrong = []
    for module, path in _sources():
        ours = FLOORS.get(_package(module))
        for imported in _imports(path):
            theirs = FLOORS.get(_package(imported))
            if ours is None or theirs is None or _package(module) == _package(imported):
                continue
            if theirs <= ours and not (ours == theirs == 0):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_every_module_has_a_floor() -> None:
    found = {_package(module) for module, _ in _sources()} - {"ict_fast.__init__"}
    assert found - FLOORS.keys() == set()


def test_nothing_imports_another_folders_private_names() -> None:
    for module, path in _sources():
        for imported in _imports(path):
            private = any(part.startswith("_") and part != "__version__" for part in imported.split(".")[1:])
            foreign = imported.startswith(("ict_fast", "ict_kernels")) and _package(imported) != _package(
                module
            )
            assert not (private and foreign), f"{module} imports {imported}"


def test_ict_kernels_imports_torch_alone_and_itself_relatively() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in (ROOT / "kernels/ict_kernels").rglob("*.py"):
        for imported in _imports(path):
            if imported.startswith("."):
                continue
            assert imported.split(".")[0] in allowed, f"{path.name} imports {imported}"


def test_only_the_command_line_imports_tyro() -> None:
    users = [module for module, path in _sources() if any(i.split(".")[0] == "tyro" for i in _imports(path))]
    assert all(module == "ict_fast.cli" or module.startswith("ict_fast.commands.") for module in users), users


def test_the_folder_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("module", ["ict_fast", "ict_fast.cli", "ict_fast.config", "ict_fast.presets"])
def test_what_help_needs_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(digits_store: Path, tmp_path: Path) -> None:
    """Nor sympy: together two seconds of its start."""
    words = ["train", "--device", "cpu", "--data.path", str(digits_store), "--out", str(tmp_path / "run")]
    words += ["--training.total-steps", "2"]
    code = (
        "import sys; from ict_fast.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or str(sys.modules.keys() & {'torch._dynamo', 'torch._inductor', 'sympy'}))"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1] == "set()", run.stderr


def test_ict_kernels_brings_nothing_of_the_trainer() -> None:
    code = (
        "import sys, ict_kernels; "
        "print({'ict_fast', 'tyro', 'rich', 'PIL', 'sklearn', 'nvidia.dali'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
