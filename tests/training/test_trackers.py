"""TensorBoard and Weights & Biases are told what log.jsonl says, and never end a run."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from ict_fast.cli import main
from ict_fast.config import Config
from ict_fast.errors import InputError
from ict_fast.training import trackers, trainer
from ict_fast.training.lookout import Lookout
from ict_fast.training.loss_by_sigma import sigma_edges
from ict_fast.training.run_directory import Run
from ict_fast.training.step import TrainStep
from ict_fast.training.trackers import chosen_tracker, tagged
from ict_fast.training.trainer import train
from ict_fast.training.world import World


def _tracked(config: Config, tracker: str, **logging: Any) -> Config:
    logging = {"grid_every": 12, "log_every": 4, "checkpoint_every": 10} | logging
    return replace(config, logging=replace(config.logging, tracker=tracker, **logging))


def _cut_at(step: int, config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until a power cut at that step."""

    class PowerCut(Exception):
        pass

    original = TrainStep.__call__

    def until(self: TrainStep, number: int, batches: object) -> None:
        if number == step:
            raise PowerCut
        original(self, number, batches)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", until)
        with pytest.raises(PowerCut):
            train(config, out=out, device="cpu")


def test_tensorboard_shows_what_the_log_says_also_after_a_cut(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by TensorBoard's own reader: every number of every line, once, and the grids."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, out = _tracked(one_level, "tensorboard"), tmp_path / "run"
    _cut_at(18, config, out, monkeypatch)
    train(config, out=out, device="cpu")
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        for tag, value in tagged(line, config).items():
            expected.setdefault(tag, []).append((line["step"], value))
    assert len({tag for tag in expected if tag.startswith("loss_by_sigma/")}) > 6
    assert {"loss", "gradient_norm", "num_scales", "skipped", "data_wait", "memory_gb"} <= expected.keys()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for tag, points in expected.items():
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in seen] == [step for step, _ in points], tag
        assert [value for _, value in seen] == pytest.approx([value for _, value in points], rel=1e-6)
    assert [event.step for event in events.Images("grid")] == [12, 24]
    grid = (out / "grids/step-00000024.png").read_bytes()
    assert events.Images("grid")[-1].encoded_image_string[:4] == grid[:4]


def test_no_tensorflow_is_loaded_for_it(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from torch.utils.tensorboard import SummaryWriter;"
        f"SummaryWriter({str(tmp_path)!r}).add_scalar('a', 1.0, 1); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_and_biases_works_without_a_network(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package, offline: one id over both starts, our own step, the figures in its file."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, out = _tracked(one_level, "wandb"), tmp_path / "run"
    _cut_at(18, config, out, monkeypatch)
    train(config, out=out, device="cpu")
    number = (out / "wandb-id").read_text().strip()
    files = list((out / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert files
    content = b"".join(path.read_bytes() for path in files)
    for word in (b"loss_by_sigma/00_0.002-0.00484", b"gradient_norm", b"frechet", b"grid"):
        assert (word in content) == (word != b"frechet")
    assert not (out / "tensorboard").exists()


def test_a_tracker_that_takes_long_to_end_is_no_hang(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `wandb.finish` may, in a run of several processes."""
    lookout, watched = Lookout(0, 2, HashStore(), 60.0), []

    def look(*_: object) -> None:
        watched.append(lookout.is_watched)

    monkeypatch.setattr(trainer, "open_tracker", lambda *_: SimpleNamespace(figures=look, close=look))
    monkeypatch.setattr(trainer, "World", partial(World, lookout))
    config = replace(one_level, training=replace(one_level.training, total_steps=2))
    train(_tracked(config, "none", log_every=1, grid_every=0), out=tmp_path / "run", device="cpu")
    assert watched == [True, True, False]


class _Recorder:
    """Stands in for a tracker; breaks after some calls."""

    def __init__(self, good_calls: int = 10**6) -> None:
        self.calls: list[tuple[str, int, Any]] = []
        self.closed, self._left = False, good_calls

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._call("figures", step, values)

    def picture(self, step: int, path: Path) -> None:
        self._call("picture", step, path)

    def close(self) -> None:
        self.closed = True

    def _call(self, *call: Any) -> None:
        if self._left == 0:
            raise OSError(28, "No space left on device")
        self._left -= 1
        self.calls.append(call)


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = _Recorder(good_calls=2)
    monkeypatch.setattr("ict_fast.training.trainer.open_tracker", lambda run, warn: recorder)
    assert train(_tracked(one_level, "none"), out=tmp_path / "run", device="cpu").exit_code == 0
    assert [call[:2] for call in recorder.calls] == [("figures", 4), ("figures", 8)]
    assert capsys.readouterr().err.count("--logging.tracker failed (No space left on device)") == 1
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("good_writes", [1, 30])
def test_a_full_disk_under_tensorboards_own_thread_is_one_warning(
    one_level: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    good_writes: int,
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    tracebacks: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: tracebacks.append(failure.exc_value))
    original, written = writer.write, []

    def write(self: object, data: bytes) -> None:
        written.append(data)
        if len(written) > good_writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    monkeypatch.setattr(writer, "write", write)
    result = train(_tracked(one_level, "tensorboard"), out=tmp_path / "run", device="cpu")
    assert (result.exit_code, result.step) == (0, 24)
    assert capsys.readouterr().err.count("--logging.tracker failed (No space left on device)") == 1
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6
    assert len(written) == good_writes + 1
    assert tracebacks == []
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert [type(error) for error in tracebacks] == [ZeroDivisionError], "another thread's are told"


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_asked_for_and_not_installed_is_one_line(
    one_level: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tracker: str,
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == tracker else original(name)
    )
    words = ["train", "--device", "cpu", "--out", str(tmp_path / "run"), "--data", one_level.data.path]
    for more in ([], ["--processes", "2"]):
        assert main([*words, "--logging.tracker", tracker, *more]) == 2
        error = capsys.readouterr().err
        assert f"--logging.tracker is {tracker}, which is not installed; `pip install {tracker}`" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_auto_is_tensorboard_where_it_is_installed(
    one_level: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for installed, chosen in ((True, "tensorboard"), (False, None)):
        found: Callable[[str], object] = lambda name, there=installed: there or None  # noqa: E731
        monkeypatch.setattr(trackers.importlib.util, "find_spec", found)
        assert chosen_tracker(_tracked(one_level, "auto")) == chosen
        assert chosen_tracker(_tracked(one_level, "none")) is None


def test_weights_and_biases_that_cannot_start_is_bad_input(
    one_level: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match=r"cannot be started \(api_key not configured .*WANDB_MODE=offline"):
        trackers.open_tracker(Run(tmp_path, _tracked(one_level, "wandb"), None), pytest.fail)


def test_a_tensorboard_that_cannot_be_opened_costs_a_warning_unless_it_was_asked_for(
    one_level: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is where its folder would be."""
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    warnings: list[str] = []
    assert trackers.open_tracker(Run(tmp_path, _tracked(one_level, "auto"), None), warnings.append) is None
    [said] = warnings
    assert said.startswith("TensorBoard cannot be started (")
    assert said.endswith("the run goes on without it")
    with pytest.raises(InputError, match=r"--logging.tracker tensorboard cannot be started .* none does"):
        trackers.open_tracker(Run(tmp_path, _tracked(one_level, "tensorboard"), None), pytest.fail)


def test_curves_are_numbers_by_tag(one_level: Config) -> None:
    means = [None] * 11 + [2.5]
    line = {"step": 4, "loss": None, "precision": "bf16", "skipped": 0, "loss_by_sigma": means, "time": 1.0}
    assert tagged(line, one_level) == {
        "precision/significant_bits": 8,
        "skipped": 0,
        f"loss_by_sigma/11_{sigma_edges(one_level.method)[11]:.3g}-80": 2.5,
    }
