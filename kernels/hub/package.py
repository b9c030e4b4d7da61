"""Lays ict_kernels out for Hugging Face's kernel hub: `python kernels/hub/package.py --out build/hub`.

The folder it writes is two things:
- a project for their kernel-builder: build.toml, flake.nix, CARD.md, torch-ext/ict_kernels/;
- a repository that their client loads as it is: build/torch-cpu/ and build/torch-cuda/, each the package with
  its metadata.json. kernels.get_local_kernel takes the folder, and so does LOCAL_KERNELS=<repo id>=<folder>.

The sources are those of kernels/ict_kernels, copied; nothing else is needed, not even torch.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "ict_kernels"
# Their builder writes this file itself, with the namespace that it gives to the build.
GENERATED_BY_THE_BUILDER = "_ops.py"

# Older clients look for build/<variant>/<name>/__init__.py.
FOR_OLDER_CLIENTS = '''"""What the folder above exports, for clients that look for the package here."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_NAME = "{id}"
if _NAME not in sys.modules:
    _spec = spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
__all__ = sys.modules[_NAME].__all__
globals().update({{name: getattr(sys.modules[_NAME], name) for name in __all__}})
'''


def write_layout(out: Path) -> None:
    """Writes everything under `out`, a folder that does not exist yet or is empty."""
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, out / name)
    sources = _copy_package(out / "torch-ext/ict_kernels")
    (sources / GENERATED_BY_THE_BUILDER).unlink()
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        _write_variant(out / f"build/torch-{backend}", backend, general)


def _copy_package(target: Path) -> Path:
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "py.typed"))
    return target


def _write_variant(folder: Path, backend: str, general: dict[str, str]) -> None:
    _copy_package(folder)
    name = general["name"].replace("-", "_")
    # Ops are registered under the module's name, which is this: another content is another name.
    everything = hashlib.sha256("".join(_digests(folder).values()).encode()).hexdigest()
    identifier = f"_{name}_{backend}_{everything[:7]}"
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(FOR_OLDER_CLIENTS.format(id=identifier), encoding="utf-8")
    metadata = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": _digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    """Base64 SHA-256 of each file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(digest).decode()
        for path, digest in digests.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    out: Path = parser.parse_args(argv).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out}: exists and is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_layout(out)
    print(f"{out}: for kernel-builder, and for kernels.get_local_kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
