"""What docs/data.md tells people to type is what the program takes, and its figures are those of the code."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from ict_fast import cli
from ict_fast.commands.prepare import PrepareOptions
from ict_fast.data.loaders import LOADERS
from ict_fast.data.sources import catalogue
from ict_fast.data.sources.array_sources import CIFAR10_MD5
from ict_fast.data.sources.crops import CROPS
from ict_fast.data.sources.download import CIFAR10_ADDRESS
from ict_fast.data.sources.image_decoding import MAX_PIXELS
from ict_fast.data.store import open_store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


def test_every_command_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    understood = []
    for name in ("prepare", "train", "doctor"):
        options, _ = cli.COMMANDS[name]
        monkeypatch.setitem(cli.COMMANDS, name, (options, lambda given: understood.append(given) or 0))
    ours = [command[1:] for command in commands() if command[0] == "ict-fast"]
    assert [cli.main(words) for words in ours] == [0] * len(ours)
    prepared = [options for options in understood if isinstance(options, PrepareOptions)]
    assert {options.source for options in prepared} == catalogue.OPTIONS.keys() - {"digits"}
    for options in prepared:
        catalogue.check_options(
            options.source, {name: v for name, v in vars(options).items() if name not in ("source", "out")}
        )


def test_the_pages_addresses_names_and_figures_are_the_codes() -> None:
    for said in (
        CIFAR10_ADDRESS,
        CIFAR10_MD5["cifar-10-python.tar.gz"],
        f"{MAX_PIXELS / 1e6:.0f} megapixels",
    ):
        assert said in PAGE
    for name in (*LOADERS, *(crop for crop in CROPS if crop != "none")):
        assert f"| `{name}`" in PAGE
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).exists()
    bytes_each = {resolution: 3 * resolution**2 + 8 for resolution in (32, 64)}  # pixels and label
    for size in (f"{50_000 * bytes_each[32] / 1e6:.0f} MB", f"{1_281_167 * bytes_each[64] / 1e9:.1f} GB"):
        assert f"| {size} |" in PAGE


def test_numpy_alone_reads_a_store_as_the_page_says(digits_store: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    found: dict = {}
    exec(code.replace("data/cifar10", str(digits_store)), found)
    assert isinstance(found["images"], np.memmap)
    np.testing.assert_array_equal(found["images"], open_store(digits_store).images)
