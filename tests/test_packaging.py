"""What a wheel and an sdist hold, built from a clean copy of the tracked files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("ict_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist; the wheel is made from the sdist, as pip would."""
    copy = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, copy / part, ignore=ignored)
        else:
            shutil.copy(source, copy / part)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return copy / "dist"


def test_the_wheel_holds_both_packages_and_never_kernels(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ict_fast", "ict_kernels"}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ict_fast").rglob("*.py")}
    kernels = ROOT / "kernels"
    ours |= {path.relative_to(kernels).as_posix() for path in (kernels / "ict_kernels").rglob("*.py")}
    assert ours <= set(names)
    assert {"ict_fast/py.typed", "ict_kernels/py.typed"} <= set(names)


def test_the_sdist_can_be_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert "kernels/ict_kernels/philox.py" in names
    assert "kernels/__init__.py" not in names


def test_the_installed_wheel_imports_and_has_its_command(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ict_fast, ict_kernels, importlib.util\n"
        "assert ict_fast.__file__.startswith(sys.argv[1]) and ict_kernels.__file__.startswith(sys.argv[1])\n"
        "theirs = importlib.util.find_spec('kernels')  # Hugging Face's, where it is installed\n"
        "assert theirs is None or not theirs.origin.startswith(sys.argv[1])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "bin/ict-fast").exists()
