"""The ternary search finds the valley, measures what `sample` makes, and says when there is no one valley."""

from __future__ import annotations

import json
import math
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ict_fast import cli
from ict_fast.checkpoint import open_checkpoint
from ict_fast.cli import main
from ict_fast.commands.search_sigma import SearchSigmaOptions, _evaluate_command, _how_to_keep
from ict_fast.config import Config
from ict_fast.consistency import ConsistencyModel, load_model, sample
from ict_fast.data.pictures import to_uint8
from ict_fast.data.store import open_store, write_store
from ict_fast.errors import InputError
from ict_fast.evaluation import DistanceToReference, evaluate
from ict_fast.evaluation.sigma_search import SigmaSearch, evaluations, search_sampling_sigmas, search_sigma
from ict_fast.results import only_writer


@pytest.mark.parametrize("valley", [0.06, 0.3, 0.821, 5.0, 19.0])
def test_it_ends_within_the_tolerance_of_the_lowest_point(valley: float) -> None:
    search = search_sigma(lambda sigma: abs(math.log(sigma / valley)) ** 1.5, 0.05, 20.0, tolerance=1.05)
    assert search.low <= valley <= search.high
    assert search.high / search.low <= 1.05
    assert search.best[0] == pytest.approx(valley, rel=0.05)
    assert len(search.tried) == evaluations(0.05, 20.0, 1.05)
    assert search.is_single_valley()


def test_the_interval_shrinks_by_a_third_with_every_pair() -> None:
    for tolerance in (1.01, 1.1, 2.0, 10.0):
        rounds = evaluations(0.05, 20.0, tolerance) // 2
        width = math.log(20 / 0.05)
        assert width * (2 / 3) ** rounds <= math.log(tolerance) < width * (2 / 3) ** (rounds - 1)


def test_two_valleys_are_noticed() -> None:
    assert not SigmaSearch(0.1, 10, [(0.2, 1.0), (1.0, 3.0), (2.0, 0.5)]).is_single_valley()
    assert SigmaSearch(0.1, 10, [(2.0, 0.5), (0.2, 1.0), (3.0, 0.7)]).is_single_valley()
    assert SigmaSearch(0.1, 10, [(2.0, 0.5), (0.2, 1.0)]).is_single_valley()


@pytest.mark.parametrize(
    ("low", "high", "tolerance"), [(2.0, 1.0, 1.1), (0.0, 1.0, 1.1), (1.0, 2.0, 1.0), (1.0, 2.0, 2.5)]
)
def test_senseless_intervals_are_refused(low: float, high: float, tolerance: float) -> None:
    with pytest.raises(InputError, match="it must be"):
        search_sigma(abs, low, high, tolerance=tolerance)


def test_every_candidate_is_what_sample_makes_from_the_same_noise(trained: Path) -> None:
    model = load_model(trained)
    seen: list[np.ndarray] = []

    def distance(images: np.ndarray) -> float:
        seen.append(images)
        return float(100 - len(seen))

    [second, third] = search_sampling_sigmas(
        model, distance, count=300, steps=3, interval=(0.2, 4.0), tolerance=3.0, seed=2
    )
    levels = [(sigma,) for sigma, _ in second.tried]
    levels += [(second.best[0], sigma) for sigma, _ in third.tried]
    assert len(levels) + 2 == len(seen) >= 8
    assert (second.without, third.without) == (100.0 - len(second.tried) - 1, 100.0 - len(seen))
    del seen[len(second.tried)], seen[-1]  # of one step, and of two
    assert all(pair[0] > pair[1] for pair in levels if len(pair) == 2)
    for sigmas, images in zip(levels, seen, strict=True):
        expected = to_uint8(sample(model, 300, steps=len(sigmas) + 1, sigmas=sigmas, seed=2))
        assert (np.abs(expected.astype(int) - images) <= 1).all()


def test_the_interval_must_lie_within_the_models_levels(trained: Path) -> None:
    with pytest.raises(InputError, match="between sigma_min"):
        search_sampling_sigmas(load_model(trained), lambda images: 0.0, count=4, interval=(0.001, 2.0))
    with pytest.raises(InputError, match="no sigma to search"):
        search_sampling_sigmas(load_model(trained), lambda images: 0.0, count=4, steps=1)


def test_the_command_writes_its_trace_and_says_what_to_type(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    torchmetrics_distance: Callable[..., float],
) -> None:
    out = tmp_path / "search.json"
    words = ["--count", "64", "--low", "0.2", "--high", "4", "--tolerance", "4", "--seed", "3"]
    assert main(["search-sigma", str(trained), *words, "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    [search] = result["searches"]
    assert (result["searched"], result["tolerance"]) == ([0.2, 4.0], 4.0)
    assert len(search["tried"]) == evaluations(0.2, 4.0, 4.0)
    best = min(search["tried"], key=lambda pair: pair["distance"])
    assert result["sigmas"] == [best["sigma"]] == [search["sigma"]]
    assert f"--steps 2 --sigmas {best['sigma']:.4g}" in printed
    assert f"with --second-sigma {best['sigma']:.4g}" in printed
    assert "--method.second-sigma" not in printed  # this run is done: the command would do nothing
    checkpoint = open_checkpoint(trained)
    config = {"training": {"total_steps": checkpoint.step + 1}}
    unfinished = replace(checkpoint, state=checkpoint.state | {"config": config})
    [line] = _how_to_keep(unfinished, "0.8", "")
    assert line == "make it the run's: resume it with --method.second-sigma 0.8"
    [line] = _how_to_keep(unfinished, "0.8", " --ema 0.9")
    assert "`ict-fast export safetensors --ema 0.9` it" in line  # the run's level is for its own average
    # The same distance as measured from scratch on `sample`'s images.
    model = load_model(trained)
    real = open_store(Path(model.config.data.path)).images
    images = to_uint8(sample(model, 64, steps=2, sigmas=(best["sigma"],), seed=3))
    assert torchmetrics_distance(real, images) == pytest.approx(best["distance"], rel=1e-3)
    # The command that it prints measures the same, but for the sigma's further digits.
    [command] = [line.partition(": ")[2] for line in printed.splitlines() if line.startswith("measure with")]
    _, *evaluated = shlex.split(command)
    assert main([*evaluated, "--count", "64", "--seed", "3"]) == 0
    measured = json.loads((tmp_path / "search-evaluation.json").read_text())
    assert measured["two_step"]["frechet_distance"] == pytest.approx(best["distance"], rel=1e-3)
    # Both say of what, by the same names.
    for key in ("features", "model_sha256", "reference_fingerprint", "device", "versions", "warnings"):
        assert result[key] == measured[key]


def test_the_command_for_evaluate_compares_with_what_the_search_did(monkeypatch: pytest.MonkeyPatch) -> None:
    understood = []
    for name in ("search-sigma", "evaluate"):
        kind, _ = cli.COMMANDS[name]
        monkeypatch.setitem(cli.COMMANDS, name, (kind, lambda given: understood.append(given) or 0))
    compared = "'a run' --reference 'its data' --features f.pt --features-sha256 ab --allow-other-recipe"
    for words in ("run", f"{compared} --ema power-0.05"):
        assert main(["search-sigma", *shlex.split(words)]) == 0
        searched = understood[-1]
        assert isinstance(searched, SearchSigmaOptions)
        assert main(shlex.split(_evaluate_command(searched, ["1.5", "0.3"], Path("trace.json")))[1:]) == 0
        measured = understood[-1]
        for name in ("run", "reference", "features", "features_sha256", "allow_other_recipe", "ema"):
            assert getattr(measured, name) == getattr(searched, name)
        assert (measured.steps, measured.sigmas) == (None, (1.5, 0.3))


@pytest.mark.parametrize(("count", "warned"), [(16, True), (17, False)])
def test_fewer_images_than_features_are_warned_of_before_the_search(
    trained: Path,
    tmp_path: Path,
    inception: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    warned: bool,
) -> None:
    def interrupted(self: DistanceToReference, images: np.ndarray) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(DistanceToReference, "to", interrupted)
    words = ["--features", str(inception), "--count", str(count), "--out", str(tmp_path / "search.json")]
    assert main(["search-sigma", str(trained), *words]) == 130
    said = capsys.readouterr().err
    assert ("warning: 16 generated images for 16 features: their covariance is singular" in said) == warned
    assert ("singular" in said) == warned


def test_a_finished_run_is_not_to_be_resumed_for_the_level_of_an_earlier_checkpoint(trained: Path) -> None:
    checkpoint = open_checkpoint(trained)
    earlier = replace(checkpoint, step=checkpoint.step - 1)
    assert checkpoint.step == checkpoint.state["config"]["training"]["total_steps"]
    [line] = _how_to_keep(earlier, "0.8", "")
    assert "export safetensors" in line


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("edm", "import weights.bin again with --second-sigma 0.8"),
        ("ict-fast", "`ict-fast export safetensors` it, and `ict-fast import safetensors` that"),
        ("diffusers", "`ict-fast export safetensors` it, and `ict-fast import safetensors` that"),
    ],
)
def test_an_imported_model_is_not_to_be_imported_from_a_file_inside_its_folder(
    trained: Path, layout: str, said: str
) -> None:
    imported = {"file": "weights.bin", "layout": layout}
    checkpoint = open_checkpoint(trained)
    model = replace(checkpoint, step=0, state=checkpoint.state | {"imported": imported})
    [line] = _how_to_keep(model, "0.8", "")
    assert said in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_keeps_every_candidate_and_the_result_before(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c: None,
    number: signal.Signals,
    code: int,
) -> None:
    measure, calls = DistanceToReference.to, 0

    def interrupted(self: DistanceToReference, images: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(number)
        return measure(self, images)

    monkeypatch.setattr(DistanceToReference, "to", interrupted)
    out = tmp_path / "search.json"
    out.write_text("an earlier search")
    words = ["search-sigma", str(trained), "--count", "8", "--low", "0.2", "--high", "4", "--tolerance", "4"]
    assert main([*words, "--out", str(out)]) == code
    assert capsys.readouterr().err.endswith(f"ict-fast: interrupted; what was tried is in {out}.partial\n")
    [search] = json.loads((tmp_path / "search.json.partial").read_text())["searches"]
    assert len(search["tried"]) == 2
    assert out.read_text() == "an earlier search"
    monkeypatch.undo()
    assert main([*words, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["searches"][0]["tried"][:2] == search["tried"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_search_that_is_interrupted_before_it_has_tried_anything_names_no_older_trace(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c: None,
) -> None:
    monkeypatch.setattr(
        DistanceToReference, "__init__", lambda *_, **options: signal.raise_signal(signal.SIGINT)
    )
    out, partial = tmp_path / "search.json", tmp_path / "search.json.partial"
    partial.write_text("what an earlier one has tried")
    assert main(["search-sigma", str(trained), "--count", "4", "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("ict-fast: interrupted; nothing was tried yet\n")


def test_a_search_that_leaves_the_next_step_no_interval_keeps_what_it_has_found(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of every pair the lower sigma is the better one, and the best so far: the search ends at --low.
    distances = iter([9.0, 10.0, 8.0, 10.0, 7.0, 10.0, 6.0, 10.0, 10.0])
    monkeypatch.setattr(DistanceToReference, "to", lambda self, images: next(distances))
    out = tmp_path / "search.json"
    words = ["--count", "4", "--low", "0.2", "--high", "4", "--tolerance", "2", "--steps", "4"]
    assert main(["search-sigma", str(trained), *words, "--out", str(out)]) == 0
    said, result = capsys.readouterr(), json.loads(out.read_text())
    [search] = result["searches"]
    assert len(search["tried"]) == evaluations(0.2, 4.0, 2.0)
    assert result["not_searched"] == [3, 4]
    assert "nothing was searched for after step 2, of 4; a lower --low leaves one" in said.err
    assert f"sample with: --steps 2 --sigmas {search['sigma']:.4g}\n" in said.out
    assert list(tmp_path.iterdir()) == [out]


def test_two_searches_do_not_share_a_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, partial = tmp_path / "search.json", tmp_path / "search.json.partial"
    partial.write_text("what the other one has tried")
    with only_writer(out):  # which an evaluation for the same file takes as well
        assert main(["search-sigma", str(trained), "--count", "4", "--out", str(out)]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert partial.read_text() == "what the other one has tried"
    assert not out.exists()


def test_a_reference_is_measured_once_by_the_search_and_by_evaluate(tmp_path: Path, inception: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    store = write_store(
        tmp_path / "store", images, np.zeros(100, np.int64), source="test", recipe="none", classes=[]
    )
    network = replace(Config().network, num_classes=0, image_channels=3, channels=8)
    data = replace(Config().data, path="not there")  # data/digits is, after `make demo`
    model = ConsistencyModel(replace(Config(), network=network, data=data))
    told: list[float] = []

    def distance() -> float:
        opened = DistanceToReference(
            model, store, features=inception, progress=lambda fraction, text: told.append(fraction)
        )
        return opened.to(images[:50])

    first = distance()
    assert told[-1] == 1
    [kept] = (store / "evaluation").iterdir()
    result = evaluate(model, store, features=inception, steps=(1,), count=50)
    assert [kept] == list((store / "evaluation").iterdir())
    assert result["reference"]["count"] == 100
    told.clear()
    assert distance() == first
    assert told == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--steps 1", "--steps is 1"),
        ("--low 3 --high 2", "positive, ascending"),
        ("--tolerance 1", "--tolerance is 1"),
        ("--high 100", "sigma_max"),
        ("--count 1", "--count is 1"),
        ("--reference nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: str, reason: str
) -> None:
    out = tmp_path / "search.json"
    assert main(["search-sigma", str(trained), *words.split(), "--out", str(out)]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_an_interval_beyond_the_models_levels_is_refused_before_the_reference_is_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistanceToReference, "__init__", lambda *_, **__: pytest.fail("too late"))
    assert main(["search-sigma", str(trained), "--high", "200", "--out", str(tmp_path / "search.json")]) == 2
    assert "the interval is 0.05 to 200.0; it must lie between sigma_min" in capsys.readouterr().err


def test_a_folder_in_place_of_the_trace_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["search-sigma", str(tmp_path), "--out", str(tmp_path)]) == 2  # there is no model there
    assert f"name a file to write, such as {tmp_path}/search-sigma.json" in capsys.readouterr().err


def test_the_models_mode_and_torchs_generator_stay(trained: Path) -> None:
    model = load_model(trained).train()
    state = torch.random.get_rng_state()
    search_sampling_sigmas(model, lambda images: 1.0, count=4, interval=(0.2, 4.0), tolerance=4.0)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
