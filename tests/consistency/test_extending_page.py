"""docs/extending.md: its Python runs, and the flags and files that it names are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ict_fast import cli
from ict_fast.commands.train import TrainOptions
from ict_fast.data.store import open_store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def test_the_pages_python_runs(digits_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits").symlink_to(digits_store)
    monkeypatch.chdir(tmp_path)
    stored, trained, own = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)

    found: dict[str, Any] = {}
    exec(stored, found)
    np.testing.assert_array_equal(open_store(Path("data/mine")).images, found["images"])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(trained, found)
        assert found["samples"].shape == (16, 1, 8, 8)
        assert found["samples"].abs().max() <= 1
        averages = found["optimizer"].ema_state_dict(found["network"])
        assert all(
            torch.equal(value, averages[name]) for name, value in found["network"].state_dict().items()
        )
        exec(own, found)

    # At sigma_min the function is the identity, whatever the network.
    with torch.no_grad():
        at_the_end = found["f"](torch.full_like(found["levels"].sigma, 0.002))
    torch.testing.assert_close(at_the_end, found["x"] + 0.002 * found["z"])
    assert found["loss"].isfinite()


def test_the_flags_that_the_page_names_are_options_of_train() -> None:
    options = cli._option_kinds(TrainOptions)
    named = set(re.findall(r"`(--[a-z]+\.[a-z0-9-]+)", PAGE))
    assert len(named) >= 10
    assert named <= options.keys()


def test_the_pages_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
