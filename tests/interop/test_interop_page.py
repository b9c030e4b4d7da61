"""What docs/interop.md tells people to type is what the program takes; its Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ict_fast import cli
from ict_fast.commands import edit, import_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/interop.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_is_understood(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported/edm-cifar10").symlink_to(trained)
    understood = []
    for name, (options, _) in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, (options, lambda given: understood.append(given) or 0))
    lines = "".join(re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)).splitlines()
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "ict-fast"
        assert cli.main(words[1:]) == 0, line
    assert len(understood) == len(lines) > 15
    for options in understood:
        if isinstance(options, import_weights.ImportOptions):
            import_weights._check_options(options)
        if isinstance(options, edit.EditOptions):
            edit._check_options(options)
    sources = {options.source for options in understood if isinstance(options, import_weights.ImportOptions)}
    assert sources == {"openai", "edm", "safetensors", "diffusers"}


def test_the_pages_digits_are_made_as_it_says(tmp_path: Path) -> None:
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "colorsys" in block
    ]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for line in re.findall(r"--input (.*?)(?: --|$)", PAGE, flags=re.MULTILINE):
        for name in line.split():
            assert (tmp_path / name).exists(), name
    assert len(list(tmp_path.glob("coloured/*/*.png"))) == 1797


def test_the_pages_links_and_pictures_are_there() -> None:
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).stat().st_size > 1000
