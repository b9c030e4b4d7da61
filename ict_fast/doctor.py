"""What `ict-fast doctor` looks at: whether this machine can train, how fast, and what to do about the rest.

Packages that may be foreign (apex, kernels) are looked at from outside and never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ict_fast.hardware import available_memory, nvidia_device, usable_cores
from ict_fast.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from ict_fast.training.feeding import Feeding

APEX_BUILD = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_GROUP_NORM=1 pip install -v --no-build-isolation"
    " git+https://github.com/NVIDIA/apex"
)
_BASE = ("matplotlib", "numpy", "pillow", "rich", "safetensors", "scikit-learn", "torchmetrics", "tyro")
_EXTRAS = ("tensorboard", "wandb", "diffusers", "scipy", "pytest-benchmark")
_TORCH = (2, 11), (2, 16)  # as setup.py has it
_INSTALL_TORCH = 'pip install "torch>=2.11,<2.16"'
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        status: "ok"; "none" (optional and absent); "warn" (works, but worse); "FAIL" (cannot train so).
        found: what is there.
        advice: what to do, or empty.
    """

    name: str
    status: Literal["ok", "none", "warn", "FAIL"]
    found: str
    advice: str = ""


def checks() -> list[Check]:
    """Everything that is looked at, in the order of the table."""
    nvidia = nvidia_device()
    torch_check, gpu_checks = _torch_and_gpus(nvidia)
    has_gpu = nvidia is not None or any(check.status == "ok" for check in gpu_checks)
    return [
        Check("ict-fast", "ok", f"{__version__} in {Path(__file__).parent}"),
        _python(),
        torch_check,
        *gpu_checks,
        _triton(has_gpu),
        _compiler(has_gpu),
        _kernels(),
        _base_requirements(),
        _dali(has_gpu),
        apex(),
        hugging_face_kernels(),
        _extras(),
        _cpu(),
        _disk(),
    ]


def feeding_checks(feeding: Feeding) -> list[Check]:
    """What was measured on a store (`--data`), and which loader would starve the device."""
    consumed, what = feeding.step.images_per_second, f"{feeding.preset} on {feeding.device}"
    checks = [Check("data", "ok", feeding.data)]
    if consumed is None:
        found = f"{what}: not measured here: {feeding.step.reason}"
        checks.append(Check("training step", "none", found))
    else:
        found = f"{what}: {consumed:,.0f} images/s, {feeding.step.batch_size:,} at a time"
        checks.append(Check("training step", "ok", found))
    for name, loader in feeding.loaders.items():
        label, rate = f"loader {name}", loader.images_per_second
        if rate is None:
            checks.append(Check(label, "none", loader.reason))
            continue
        found = f"{rate:,.0f} images/s" + (", auto takes it" if name == feeding.auto else "")
        if consumed is not None:
            found += f", {rate / consumed:,.1f} times what the step consumes"
        starves = name in feeding.starving
        remedy = f"--data.loader {feeding.fastest} is the fastest here" if starves else ""
        checks.append(Check(label, "warn" if starves else "ok", found, remedy))
    if consumed is None:
        return [*checks, Check("feeding", "none", "unknown, as the step was not measured")]
    verdict = f"{', '.join(feeding.starving) or 'no loader'} would starve the device"
    return [*checks, Check("feeding", "warn" if feeding.starving else "ok", verdict)]


def memory(images: int) -> Check:
    """Whether the images of a store, so many bytes, fit into what the system can give."""
    available = available_memory()
    if available is None:
        return Check("memory", "none", "this system does not say how much is available")
    fits = images <= available
    return Check(
        "memory",
        "ok" if fits else "warn",
        f"{available / _GIB:.1f} GiB available, the images have {images / _GIB:.1f} GiB",
        "" if fits else "most images will be read from the disk each time: more memory, or a fast local disk",
    )


def table(found: list[Check]) -> Table:
    """The checks as a table. What to do is not in it but in `advice`, whose commands must not be wrapped."""
    from rich.table import Table
    from rich.text import Text

    shown = Table()
    for heading in ("", "status", "found"):
        shown.add_column(heading, overflow="fold")
    colours = {"ok": "green", "none": "dim", "warn": "yellow", "FAIL": "bold red"}
    for check in found:
        shown.add_row(check.name, Text(check.status, style=colours[check.status]), Text(check.found))
    return shown


def advice(found: list[Check]) -> str:
    """What to do, a line per check that has any, and the verdict."""
    failed = [check.name for check in found if check.status == "FAIL"]
    verdict = f"Essential and missing: {', '.join(failed)}." if failed else "This machine can train."
    return "\n".join([*(f"{check.name}: {check.advice}" for check in found if check.advice), verdict])


def apex() -> Check:
    """Whether apex is NVIDIA's, which has fused kernels, or the unrelated one of PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("apex", "none", "not installed; optional, a peer for comparison", APEX_BUILD)
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "optimizers").is_dir() and (place / "contrib").is_dir() for place in places):
        where = spec.origin or ", ".join(map(str, places))
        return Check(
            "apex",
            "warn",
            f"{where} is not NVIDIA's (on PyPI, apex is a toolkit for Pyramid); it is not used",
            f"pip uninstall apex; {APEX_BUILD}",
        )
    extensions = {"amp_C": "fused optimizers", "group_norm_cuda": "group norm"}
    built = [words for name, words in extensions.items() if importlib.util.find_spec(name) is not None]
    missing = [words for words in extensions.values() if words not in built]
    found = f"NVIDIA's {_version('apex') or ''} with {' and '.join(built) or 'no CUDA extension'}"
    return Check("apex", "warn" if missing else "ok", found, APEX_BUILD if missing else "")


def hugging_face_kernels() -> Check:
    """Whether `import kernels` gives Hugging Face's package, if it is installed, and not a folder of ours."""
    installed = _version("kernels")
    spec = importlib.util.find_spec("kernels")
    name = "kernels (Hugging Face)"
    if spec is None or spec.origin is None:  # a folder without __init__.py never hides an installed package
        return Check(name, "none", "not installed; optional")
    if installed is not None and spec.origin == _file_of("kernels", "kernels/__init__.py"):
        return Check(name, "ok", installed)
    return Check(
        name,
        "warn",
        f"`import kernels` gives {spec.origin}, which is not Hugging Face's",
        f"rename or remove {spec.origin}",
    )


def _torch_and_gpus(nvidia: str | None) -> tuple[Check, list[Check]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA is missing
        reason = " ".join(str(error).split())
        return Check("torch", "FAIL", f"cannot be imported: {reason}", _INSTALL_TORCH), []
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA (a CPU build)"
    supported = _TORCH[0] <= _numbers(torch.__version__) < _TORCH[1]
    torch_check = Check(
        "torch",
        "ok" if supported else "warn",
        f"{torch.__version__}, {build}",
        "" if supported else f"tested with 2.11 to 2.15: {_INSTALL_TORCH}",
    )
    if not torch.cuda.is_available():
        if nvidia is None:
            return torch_check, [Check("GPU", "none", "none; training runs on the CPU")]
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            found = (
                f"NVIDIA device ({nvidia}), hidden by an empty CUDA_VISIBLE_DEVICES; training runs on the CPU"
            )
            return torch_check, [Check("GPU", "none", found)]
        if not torch.version.cuda:
            advice = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        elif not nvidia.startswith("/dev"):
            advice = "make the device visible here (for a container: docker run --gpus all)"
        else:
            advice = (
                "update the NVIDIA driver or install a torch for an older CUDA; check CUDA_VISIBLE_DEVICES"
            )
        found = f"NVIDIA device ({nvidia}) that torch cannot use"
        return torch_check, [Check("GPU", "FAIL", found, f"{advice}; or train with --device cpu")]
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found = (
            f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB,"
            f" compute {properties.major}.{properties.minor}"
        )
        try:
            usable = float((torch.ones(8, device=f"cuda:{number}") + 1).sum()) == 16.0
            reason = "a sum on it is wrong"
        except RuntimeError as error:
            usable, reason = False, str(error).splitlines()[0]
        if usable:
            gpus.append(Check(f"GPU {number}", "ok", found))
        else:
            advice = "install a torch built for this GPU, free its memory, or train with --device cpu"
            gpus.append(Check(f"GPU {number}", "FAIL", f"{found}: {reason}", advice))
    return torch_check, gpus


def _python() -> Check:
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    return Check(
        "Python", "ok" if supported else "FAIL", found, "" if supported else "use Python 3.11 to 3.13"
    )


def _triton(has_gpu: bool) -> Check:
    version = _version("triton")
    if version is None:
        found = "not installed; the fused kernels need it" if has_gpu else "not installed; a CPU does without"
        return Check("Triton", "FAIL" if has_gpu else "none", found, "pip install triton" if has_gpu else "")
    if (3, 6) <= _numbers(version) < (3, 10):
        return Check("Triton", "ok", version)
    return Check("Triton", "warn", version, "tested with 3.6 to 3.9, as torch ships it")


def _compiler(has_gpu: bool) -> Check:
    """Triton compiles its launchers, and Inductor its CPU code, on this machine."""
    name = "C compiler, Python.h"
    c_compiler = _first_program(os.environ.get("CC"), "cc", "gcc", "clang")
    cpp_compiler = _first_program(os.environ.get("CXX"), "g++", "c++", "clang++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [
        what
        for what, there in (("C", c_compiler), ("C++", cpp_compiler), (str(header), header.is_file()))
        if not there
    ]
    if not missing:
        return Check(name, "ok", f"{c_compiler}, {cpp_compiler}, {header}")
    return Check(
        name,
        "FAIL" if has_gpu else "warn",
        f"missing: {', '.join(missing)}; Triton and torch.compile need them",
        f"apt install build-essential python{sys.version_info.major}.{sys.version_info.minor}-dev (or alike)",
    )


def _kernels() -> Check:
    spec = importlib.util.find_spec("ict_kernels")
    if spec is None or spec.origin is None:
        return Check("ict_kernels", "FAIL", "not importable", "pip install -e . in the repository")
    return Check("ict_kernels", "ok", str(Path(spec.origin).parent))


def _base_requirements() -> Check:
    missing = [name for name in _BASE if _version(name) is None]
    if missing:
        return Check(
            "requirements", "FAIL", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        )
    return Check("requirements", "ok", ", ".join(f"{name} {_version(name)}" for name in _BASE))


def _dali(has_gpu: bool) -> Check:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"):
        version = _version(name)
        if version is not None:
            return Check("DALI", "ok", f"{name} {version}")
    advice = 'pip install -c constraints.txt -e ".[dali]" (CUDA 13) or ".[dali-cu12]"' if has_gpu else ""
    return Check("DALI", "none", "not installed; optional, feeds a GPU", advice)


def _extras() -> Check:
    there = [f"{name} {version}" for name in _EXTRAS if (version := _version(name))]
    absent = [name for name in _EXTRAS if _version(name) is None]
    found = "; ".join(
        part for part in (", ".join(there), f"not installed: {', '.join(absent)}" if absent else "") if part
    )
    return Check("optional extras", "ok" if there else "none", found)


def _cpu() -> Check:
    threads = os.environ.get("OMP_NUM_THREADS")
    if "torch" in sys.modules:
        threads = str(sys.modules["torch"].get_num_threads())
    return Check(
        "CPU",
        "ok",
        f"{usable_cores()} of {os.cpu_count()} cores usable, {threads or 'unknown'} torch threads",
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    found = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < 0.2:
        return Check("disk", "FAIL", found, "free some space, or change to another disk")
    return Check(
        "disk", "ok" if free >= 5 else "warn", found, "" if free >= 5 else "a large run writes several GiB"
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_of(distribution: str, name: str) -> str | None:
    """Where an installed distribution has a file of that name."""
    for file in importlib.metadata.files(distribution) or ():
        if str(file) == name:
            return str(file.locate())
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name.split()[0]))), None)
