"""Every command of the README runs as it stands there (training shortened, in an empty directory)."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet
from forked import ForkedPython
from PIL import Image

from ict_fast.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = shlex.split(
    "--training.total-steps 8 --training.batch-size 16 --logging.grid-every 0 --logging.evaluate-count 64 "
    "--device cpu"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


_TEMPORARY = tempfile.TemporaryDirectory(prefix="readme-")


@cache
def workshop() -> Path:
    """An empty directory, but for what the commands take for granted: pictures, archives of them, Parquet."""
    folder = Path(_TEMPORARY.name)
    for number, name in enumerate(("n01440764", "n01443537")):
        (folder / "pictures" / name).mkdir(parents=True)
        picture = Image.new("RGB", (80, 70 + number), (number * 200, 100, 50))
        picture.save(folder / "pictures" / name / f"{name}_1.JPEG")
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        archive.add(folder / "pictures", arcname=".")
    encoded = [path.read_bytes() for path in sorted((folder / "pictures").rglob("*.JPEG"))]
    (folder / "flowers/data").mkdir(parents=True)
    table = pyarrow.table({"image": [{"bytes": each} for each in encoded], "label": [0, 1]})
    pyarrow.parquet.write_table(table, folder / "flowers/data/train-00000-of-00001.parquet")
    return folder


def ict_fast_commands() -> Iterator[list[str]]:
    """Those of the README, shortened."""
    for command in commands():
        if command[0] != "ict-fast" or "--download" in command:  # test_download.py has a server for it
            continue
        if (
            command[1] == "train" and "--gpus" in command
        ):  # what its options mean is shown; that it trains is for tests/gpu
            command = [*command, "--dry-run"]
        elif command[1] == "evaluate":
            command = [*command, "--count", "600"]
        elif command[1] == "search-sigma":
            command = [*command, "--count", "100", "--tolerance", "3"]
        elif command[1] == "ablate" and "--only" in command:  # one of them runs
            command = [*command, "--list"]
        elif command[1] == "ablate":
            command = [*command, *shlex.split("--only ict --seeds 1 --total-steps 8 --count 64 --device cpu")]
        elif command[1] == "train" and "--dry-run" not in command:
            command = [*shlex.split(re.sub(r"--training.total-steps \d+", "", shlex.join(command))), *SHORT]
        yield command


def test_the_readmes_ict_fast_commands_run_in_their_order(tmp_path: Path) -> None:
    ran = 0
    for command in ict_fast_commands():
        process = ForkedPython(["-m", "ict_fast", *command[1:]], tmp_path / "output", workshop())
        assert process.wait(timeout=600) == 0, f"{shlex.join(command)}\n{process.output()}"
        ran += 1
    assert ran >= 12
    for name in (
        "digits.png",
        "samples.npz",
        "runs/two-processes/config.json",
        "data/imagenet64/meta.json",
        "data/flowers/meta.json",
    ):
        assert (workshop() / name).exists()


def test_the_other_commands_are_ones_that_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in commands():
        if command[0] == "make":
            assert command[1] in targets
        elif command[0] == "pip":
            assert (ROOT / "constraints.txt").exists()
        elif command[0] == "torchrun":
            importlib.import_module("torch.distributed.run").parse_args(command[1:])
            assert main([*command[command.index("train") :], "--dry-run"]) == 0
        elif command[0] in ("pytest", "python"):
            assert (ROOT / command[1]).exists()
        else:
            assert command[0] == "ict-fast", command


def test_the_readmes_python_runs() -> None:
    for block in blocks("python"):
        code = block.replace('config = ict_fast.presets.get("digits")', _SHORT_CONFIG)
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=workshop(), capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{code}\n{run.stderr}"


_SHORT_CONFIG = """
from dataclasses import replace
config = ict_fast.presets.get("digits")
config = replace(config, training=replace(config.training, total_steps=16))
"""


def test_the_readmes_picture_is_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 1000
