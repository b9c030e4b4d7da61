"""docs/method.md: one command draws its pictures, its links lead somewhere, its formulas are the code's."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ict_fast import cli, presets
from ict_fast.config import MethodConfig
from ict_fast.consistency.curriculum import stages
from ict_fast.consistency.model import load_model
from ict_fast.training.trainer import train
from ict_kernels import c_in, c_out, c_skip, noise_level_grid

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/method.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "benchmarks"))

pictures: Any = importlib.import_module("method_pictures")


@pytest.fixture(scope="module")
def run(digits_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps with snapshots."""
    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(digits_store)),
        network=replace(preset.network, channels=8, num_classes=0),
        training=replace(preset.training, total_steps=24, batch_size=16),
        logging=replace(preset.logging, grid_every=0, checkpoint_every=12, snapshot_every=12),
    )
    out = tmp_path_factory.mktemp("method") / "run"
    train(config, out=out, device="cpu")
    return out


def test_the_command_draws_the_pages_pictures_from_a_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    assert pictures.main([str(run), "--batches", "2", "--out", str(out)]) == 0
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == {Path(name).name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE)}
    for name in drawn:
        Image.open(out / name).load()
    figures = json.loads((out / "figures.json").read_text())
    assert figures["snapshots"] == [12, 24]
    assert list(figures["loss_by_level"]) == ["11", "1281"]
    for buckets in figures["loss_by_level"].values():
        assert sum(bucket["share"] for bucket in buckets) == pytest.approx(1, abs=0.02)


def test_the_loss_by_level_is_that_of_the_definition(run: Path) -> None:
    """Of one image, from noise drawn by torch."""
    model = load_model(run)
    images = torch.full((1, 1, 8, 8), 0.25)
    buckets = pictures.loss_by_level(model, images, None, 11, batches=4)
    compared = 0
    grid = noise_level_grid(11).float()
    generator = torch.Generator().manual_seed(1)
    for bucket in buckets:
        inside = [
            i for i in range(10) if abs(math.log(float(grid[i]) / bucket["sigma"])) < math.log(40_000) / 20
        ]
        if len(inside) != 1:
            continue  # a mean over several pairs
        z = torch.randn((400, 1, 8, 8), generator=generator)
        student = model(images + grid[inside[0] + 1] * z, float(grid[inside[0] + 1]))
        teacher = model(images + grid[inside[0]] * z, float(grid[inside[0]]))
        c = 0.00054 * 8
        expected = (((student - teacher) ** 2).sum(dim=(1, 2, 3)) + c**2).sqrt().mean() - c
        assert bucket["distance"] == pytest.approx(float(expected), rel=0.1)
        gap = float(grid[inside[0] + 1] - grid[inside[0]])
        assert bucket["loss"] == pytest.approx(bucket["distance"] / gap, rel=1e-5)
        compared += 1
    assert compared >= 4


def test_a_place_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main([str(tmp_path / "none"), "--out", str(tmp_path / "pictures")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_the_pages_pictures_and_links_are_there() -> None:
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE)
    assert len(images) == 5
    for image in images:
        assert 5_000 < (ROOT / "docs" / image).stat().st_size < 200_000
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    assert "docs/method.md" in (ROOT / "README.md").read_text()


def test_the_pages_commands_make_a_run_with_snapshots_and_draw_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the demo's run, which is finished where somebody made it: training it again would do nothing."""
    options, _ = cli.COMMANDS["train"]
    trained: list[Any] = []
    monkeypatch.setitem(cli.COMMANDS, "train", (options, lambda given: trained.append(given) or 0))
    drawn: list[Path] = []
    monkeypatch.setattr(pictures, "draw_all", lambda run, out, batches: drawn.append(run))
    (block,) = re.findall(r"```console\n(.*?)```", PAGE, flags=re.DOTALL)
    first, second = map(shlex.split, block.splitlines())
    assert cli.main(first[1:]) == 0
    assert second[:2] == ["python", "benchmarks/method_pictures.py"]
    assert pictures.main(second[2:]) == 0
    assert drawn == [trained[0].out]
    assert trained[0].out != Path("runs") / trained[0].preset, "where train writes when it is not told"
    config = trained[0].config()
    total, every = config.training.total_steps, config.logging.snapshot_every
    plan = stages(total, config.method)
    assert [stage.end_step for stage in plan] == list(range(every, total + 1, every)), "one after every stage"


def test_the_pages_figures_are_the_results() -> None:
    results = ROOT / "benchmarks/results"
    text = " ".join(PAGE.split())
    runs = json.loads((results / "digits-quality.json").read_text())["runs"]
    one, two = (
        sorted(100 * run[steps]["relative_to_noise"] for run in runs) for steps in ("one_step", "two_step")
    )
    assert all(run["one_step"]["relative_to_noise"] < run["two_step"]["relative_to_noise"] for run in runs)
    assert len(runs) == 3
    assert f"two steps end at {two[0]:.2f} to {two[-1]:.2f} % of the distance of noise" in text
    assert f"one at {one[0]:.2f} to {one[-1]:.2f} %, worse for all three seeds" in text
    (levels,) = (
        record["levels"]
        for record in json.loads((results / "exactness.json").read_text())["targets"]
        if (record["problem"], record["num_scales"]) == ("mixture", 1281)
    )
    (level,) = (level for level in levels if level["near"] == 0.8)
    assert f"at N = 1281, {level['bias']:.1e} beside {level['std']:.1e}" in text


def test_the_pages_formulas_are_the_codes() -> None:
    found = {name.strip(): body.strip() for name, body in re.findall(r"(c_\w+) += ([^=]+?)(?:  |\n|,)", PAGE)}
    sigma = torch.tensor(1.7, dtype=torch.float64)
    names = {"s": float(sigma), "sd": 0.5, "sigma_min": 0.002, "sqrt": math.sqrt, "ln": math.log}
    for name, function in (("c_skip", c_skip), ("c_out", c_out), ("c_in", c_in)):
        code = re.sub(r"\bsd \(", "sd * (", found[name].replace("^", "**"))
        assert eval(code, names) == pytest.approx(float(function(sigma)), rel=1e-12), code
    grid = next(line for line in PAGE.splitlines() if line.strip().startswith("s_i = ")).split("=", 1)[1]
    code = grid.split(",")[0].replace("^", "**").replace(") (", ") * (")
    values = {"i": 5, "N": 11, "sigma_min": 0.002, "sigma_max": 80.0}
    assert eval(code, values) == pytest.approx(float(noise_level_grid(11)[4]), rel=1e-12)
    counts = [stage.num_scales for stage in stages(8000, MethodConfig())]
    assert f"{counts[0]}, {counts[1]}, ..., {counts[-1]}, with N - 1 pairs" in PAGE
