"""Packaging of ict-fast: the trainer (ict_fast) and its drop-in kernels (ict_kernels)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "ict_fast/version.py").read_text()).group(1)

LINUX = '; sys_platform == "linux"'
EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.0" + LINUX],
    "dali-cu12": ["nvidia-dali-cuda120>=1.50" + LINUX],
    "metrics": ["torchmetrics>=1.4", "scipy>=1.11"],
    "parquet": ["pyarrow>=15"],
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.17"],
    "diffusers": ["diffusers>=0.30"],
    "dev": [
        "build",
        "diffusers>=0.30",  # its pipelines are run
        "kernels>=0.17",  # Hugging Face's client of the kernel hub; nothing of ours is called that
        "mypy>=1.10",
        "nvidia-dali-cuda130>=2.0" + LINUX,  # its CPU pipeline is tested
        "pre-commit",
        "pyarrow>=15",
        "pytest>=8",
        "pytest-benchmark>=4",
        "pytest-xdist>=3.8",  # for --no-loadscope-reorder, in the Makefile
        "ruff>=0.6",
        "scipy>=1.11",
        "setuptools>=68",
        "tensorboard>=2.16",
        "wandb>=0.17",
        "wheel",
    ],
}

setup(
    name="ict-fast",
    version=VERSION,
    description="Improved consistency training (iCT) of one-step image generators",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["ict_fast", "ict_fast.*"])
    + find_packages("kernels", include=["ict_kernels", "ict_kernels.*"]),
    # Named package by package: kernels/ itself must never be importable (Hugging Face's `kernels`).
    package_dir={"ict_kernels": "kernels/ict_kernels"},
    package_data={"ict_fast": ["py.typed", "interop/travelling/*.py"], "ict_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10" + LINUX,
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pillow>=10",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "torchmetrics>=1.4",
        "tyro==1.0.17",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ict-fast = ict_fast.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
    ],
)
