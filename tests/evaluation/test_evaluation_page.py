"""What docs/evaluation.md tells people to type is what the program takes, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ict_fast import cli
from ict_fast.evaluation.feature_networks import INCEPTION_SHA256

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_every_command_of_the_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    understood = []
    for name in ("evaluate", "sample"):
        options, _ = cli.COMMANDS[name]
        monkeypatch.setitem(cli.COMMANDS, name, (options, lambda given: understood.append(given) or 0))
    lines = "".join(re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)).splitlines()
    assert [cli.main(shlex.split(line)[1:]) for line in lines] == [0] * len(lines)
    assert len(understood) == len(lines) >= 4


def test_the_inception_file_is_known_by_the_sha256_of_the_data_page() -> None:
    assert f"`{INCEPTION_SHA256}`" in (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_its_picture_and_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / "docs" / target).stat().st_size > 1000
