"""An evaluation shared among processes, stopped, and continued: the same numbers."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ict_fast.cli import main
from ict_fast.config import Config
from ict_fast.consistency import ConsistencyModel, sample_pixels
from ict_fast.errors import DivergedError, InputError, TrainingError
from ict_fast.evaluation import chunks, discard_work, evaluate, processes
from ict_fast.evaluation.chunks import Chunk, Finished, Work, generated_chunks, reference_chunks
from ict_fast.evaluation.feature_networks import DigitsNetwork
from ict_fast.evaluation.measured_reference import MeasuredReference, cache_files, keep, read_cached
from ict_fast.evaluation.reference import Images, Reference
from ict_fast.evaluation.statistics import Statistics

COUNT = 2100  # three chunks, the last one short


@pytest.fixture
def model(tiny: Config) -> ConsistencyModel:
    """Untrained, class-conditional; its images are about the noise that they are made from."""
    config = replace(tiny, network=replace(tiny.network, num_classes=10))
    return ConsistencyModel(config).eval().requires_grad_(False)


@pytest.fixture
def measure(model: ConsistencyModel, digits_store: Path, inception: Path) -> Callable[..., dict[str, Any]]:
    """Measures the model by features of a file; further options may be given."""
    # The store is shared by the tests of this session: what one of them keeps there, the others find.
    return lambda **options: evaluate(
        model, digits_store, steps=(1, 2), count=COUNT, features=inception, **options
    )


def test_one_two_and_three_processes_give_the_same_to_the_last_bit(
    measure: Callable[..., dict[str, Any]], digits_store: Path, tmp_path: Path
) -> None:
    results = []
    for number in (1, 2, 3):
        for kept in digits_store.glob("evaluation/*"):  # so that the reference is measured again
            kept.unlink()
        results.append(measure(devices=["cpu"] * number))
    assert results[0] == results[1] == results[2]


def test_an_interrupted_evaluation_continues(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure()

    def interrupt(fraction: float, text: str) -> None:
        if "two steps" in text and fraction > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(work_folder=tmp_path, progress=interrupt)
    kept = {path.name for path in tmp_path.glob("*/*.npz")}
    assert kept

    computed = []
    compute = Work.compute

    def counted(self: Work, chunk: Chunk, *rest: Any) -> Any:
        computed.append(chunk.name)
        return compute(self, chunk, *rest)

    monkeypatch.setattr(Work, "compute", counted)
    assert measure(work_folder=tmp_path) == whole
    assert computed
    assert not {f"{name}.npz" for name in computed} & kept


def test_an_interrupted_evaluation_outlives_another_one_for_the_same_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "GENERATED", 256)
    computed: list[str] = []
    compute = Work.compute

    def run(seed: int, most: float = float("inf")) -> int:
        def counted(self: Work, chunk: Chunk, *rest: Any) -> Any:
            if len(computed) == most:
                raise KeyboardInterrupt
            computed.append(chunk.name)
            return compute(self, chunk, *rest)

        computed.clear()
        monkeypatch.setattr(Work, "compute", counted)
        words = ["evaluate", str(trained), "--steps", "1", "--count", "768", "--seed", str(seed)]
        return main([*words, "--out", str(tmp_path / "result.json")])

    assert run(seed=1) == 0
    expected = json.loads((tmp_path / "result.json").read_text())
    whole = computed.copy()
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]
    assert run(seed=1, most=len(whole) - 1) == 130
    assert run(seed=0, most=1) == 130
    capsys.readouterr()
    assert run(seed=0) == 0
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert str(folder) in capsys.readouterr().err
    assert run(seed=1) == 0
    assert computed == whole[-1:]
    assert json.loads((tmp_path / "result.json").read_text()) == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_a_result_that_could_not_be_written_costs_no_chunk(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Its call had returned; another one for the same file then ends well."""
    measure(work_folder=tmp_path)
    measure(work_folder=tmp_path, seed=1)
    discard_work(tmp_path)
    [left] = tmp_path.iterdir()
    assert list(left.glob("2-steps*.npz"))
    measure(work_folder=tmp_path)
    discard_work(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_was_computed_for_something_else_is_not_taken(
    measure: Callable[..., dict[str, Any]], model: ConsistencyModel, tmp_path: Path
) -> None:
    first = measure(work_folder=tmp_path)
    assert measure(work_folder=tmp_path, seed=1) == measure(seed=1) != first
    next(model.parameters()).add_(0.1)
    assert measure(work_folder=tmp_path) == measure() != first


def test_what_was_computed_at_other_noise_levels_is_not_taken(
    model: ConsistencyModel, digits_store: Path, inception: Path, tmp_path: Path
) -> None:
    def measured(sigmas: tuple[float, ...] | None, folder: Path | None) -> dict[str, Any]:
        options: dict[str, Any] = {"count": 64, "features": inception, "work_folder": folder}
        return evaluate(model, digits_store, steps=(2,), sigmas=sigmas, **options)

    results = [measured(sigmas, tmp_path) for sigmas in (None, (5.0,), (0.3,))]
    assert results == [measured(sigmas, None) for sigmas in (None, (5.0,), (0.3,))]
    assert len({result["two_step"]["frechet_distance"] for result in results}) == 3


def test_what_was_kept_is_computed_again_whichever_byte_of_it_is_damaged(tmp_path: Path) -> None:
    chunk, kept = Chunk(1, 0, 3), Finished(tmp_path)
    kept.keep(chunk, {"features": np.ones((3, 4))})
    measured = MeasuredReference(Statistics(np.zeros(4), np.eye(4)), 3, np.ones((3, 4)))
    keep([tmp_path / "reference.npz"], measured)
    network: Any = SimpleNamespace(num_features=4)
    for path in tmp_path.glob("*.npz"):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert kept.missing([chunk]) in ([], [chunk])
            read_cached([tmp_path / "reference.npz"], network)
        path.write_bytes(whole)
    assert kept.missing([chunk]) == []
    assert read_cached([tmp_path / "reference.npz"], network) is not None


def test_a_damaged_chunk_is_computed_again(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole = measure(work_folder=tmp_path)
    damaged = sorted(tmp_path.glob("*/*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert measure(work_folder=tmp_path) == whole


def test_a_full_disk_is_one_line_and_loses_nothing(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = chunks.np.savez

    def full(file: Any, **arrays: Any) -> None:
        if any(tmp_path.glob("*/2-steps*.npz")):
            raise OSError(28, "No space left on device")
        saved(file, **arrays)

    monkeypatch.setattr(chunks.np, "savez", full)
    with pytest.raises(InputError, match=r"No space left.*the same command continues") as refused:
        measure(work_folder=tmp_path)
    assert "\n" not in str(refused.value)
    assert len(list(tmp_path.glob("*/2-steps*.npz"))) == 1
    assert not list(tmp_path.glob("*/.tmp-*"))


def test_a_killed_process_ends_the_evaluation_which_then_continues(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def kill(fraction: float, text: str) -> None:
        if "two steps" in text:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(TrainingError, match=r"process \d of the evaluation was ended by SIGKILL; the same"):
        measure(devices=["cpu"] * 2, work_folder=tmp_path, progress=kill)
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("*/1-steps*.npz"))) >= 1
    assert measure(work_folder=tmp_path) == measure()


class MetByAll:
    """Is unpickled, as None, once so many processes are at it, at most a minute after the first one."""

    def __init__(self, folder: Path, number: int) -> None:
        self._meeting = (
            "import os, pathlib, signal, time\n"
            "os.kill(os.getpid(), signal.SIGTERM)\n"
            f"folder, end = pathlib.Path({str(folder)!r}), time.monotonic() + 60\n"
            "(folder / str(os.getpid())).touch()\n"
            f"while len(list(folder.iterdir())) < {number}:\n"
            "    assert time.monotonic() < end, 'no other process has come so far'\n"
            "    time.sleep(0.02)\n"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._meeting,)


def test_the_processes_start_at_the_same_time_however_large_the_work_is(tiny: Config, tmp_path: Path) -> None:
    """Each gets it when it is up: nobody waits until another one has imported torch and read all.

    A SIGTERM that a scheduler sends to all of them is for the one that has started them.
    """
    for name in ("met", "kept"):
        (tmp_path / name).mkdir()
    labels: Any = MetByAll(tmp_path / "met", 2)
    work = Work(ConsistencyModel(tiny), DigitsNetwork(), labels, 0, None, np.arange(10**6))
    parts, kept = [Chunk(1, 0, 2), Chunk(1, 2, 2)], Finished(tmp_path / "kept")
    processes.compute_chunks(work, parts, kept, [torch.device("cpu")] * 2, lambda done, text: None)
    assert kept.missing(parts) == []


def test_a_process_that_ends_without_its_share_and_without_an_error_is_not_taken_for_done(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: None, kill=lambda: None, join=lambda: None, exitcode=0)

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=ended)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: context)
    work = Work(ConsistencyModel(tiny), DigitsNetwork(), None, 0, None, None)
    with pytest.raises(TrainingError, match="ended early; the same command continues"):
        processes.compute_chunks(
            work, [Chunk(1, 0, 2)], Finished(tmp_path), [torch.device("cpu")] * 2, lambda done, text: None
        )


def test_a_reference_that_goes_away_is_one_line_of_its_process(
    model: ConsistencyModel, digits_store: Path, inception: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    reference = tmp_path / "real.npz"
    np.savez(reference, arr_0=np.load(digits_store / "images.npy")[:64])
    with pytest.raises(InputError, match=r"real\.npz: cannot be read: No such file"):
        evaluate(
            model,
            reference,
            count=8,
            features=inception,
            devices=["cpu"] * 2,
            progress=lambda *_: reference.unlink(missing_ok=True),
        )
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(116, "Stale file handle", "net.pt"), OSError(116, "Stale file handle", "net.pt")),
        (InputError("no images"), InputError("no images")),
        (DivergedError("NaN"), DivergedError("NaN")),
        (MemoryError(), TrainingError("a process of the evaluation failed: MemoryError")),
        (BrokenPipeError(), None),  # the parent was killed
    ],
)
def test_a_process_tells_what_has_ended_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: Exception | None
) -> None:
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)

    def fail(*_: Any) -> None:
        raise error

    work = SimpleNamespace(model=nn.Linear(1, 1), compute=fail)
    given, answers = iter([(work, None), [Chunk(1, 0, 2)]]), []
    pipe: Any = SimpleNamespace(recv=lambda: next(given), send=answers.append)
    processes._serve(torch.device("cpu"), torch.get_num_threads(), pipe)
    expected = [] if told is None else [told]
    assert [(type(answer), answer.args) for answer in answers] == [(type(e), e.args) for e in expected]


def test_chunks_of_other_code_or_other_numbers_of_threads_are_not_taken(
    model: ConsistencyModel, digits_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> int:
        evaluate(model, digits_store, steps=(1,), count=8, work_folder=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert (kept(), kept()) == (1, 1)
    for module, name in ((chunks, "_VERSION"), (chunks, "BATCH_SIZE")):
        monkeypatch.setattr(module, name, getattr(module, name) + 1)
    assert kept() == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert kept() == 3


@pytest.mark.parametrize("kind", ["samples", "a store that cannot be written"])
def test_a_reference_is_computed_once_where_there_is_a_folder_for_it(
    model: ConsistencyModel,
    digits_store: Path,
    inception: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    reference = tmp_path / "samples.npz"
    if kind == "samples":
        np.savez(reference, arr_0=np.load(digits_store / "images.npy")[:300])
    else:
        reference = tmp_path / "store"
        shutil.copytree(digits_store, reference, ignore=shutil.ignore_patterns("evaluation"))
        (reference / "evaluation").write_text("no folder")
    computed = []
    compute = Work.compute

    def counted(self: Work, chunk: Chunk, *rest: Any) -> Any:
        computed.append(chunk.name.partition("-")[0])
        return compute(self, chunk, *rest)

    monkeypatch.setattr(Work, "compute", counted)
    cache = tmp_path / "cache"
    results = [
        evaluate(model, reference, steps=(1,), count=64, features=inception, reference_cache=folder)
        for folder in (cache, cache, None)
    ]
    assert results[0] == results[1] == results[2]
    chunks_of_it = computed.index("1")
    measured = ["reference"] * chunks_of_it
    assert chunks_of_it > 0
    assert computed == [*measured, "1", "1", *measured, "1"]
    assert len(list(cache.iterdir())) == 1


class Pixels:
    """Features that are the pixels."""

    name, sha256, num_features, batch_size = "pixels", "", 64, 512

    def __call__(self, images: np.ndarray, *_: object, **__: object) -> tuple[np.ndarray, None]:
        return images.reshape(len(images), -1).astype(np.float64), None


def test_a_chunk_holds_the_images_of_its_numbers_with_their_labels(model: ConsistencyModel) -> None:
    class OfClass(ConsistencyModel):
        def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
            assert labels is not None
            return x / 160 + labels.view(-1, 1, 1, 1) / 20

    model, labels = OfClass(model.config, nn.Linear(1, 1)), torch.arange(600) * 7 % 10
    work = Work(model, Pixels(), labels, 3, None, np.arange(0))
    computed = work.compute(Chunk(1, 512, 40), torch.device("cpu"), lambda cost: None)
    whole = sample_pixels(model, 600, labels=labels, seed=3)
    assert np.array_equal(computed["features"], Pixels()(whole[512:552])[0])


def test_a_reference_chunk_of_several_blocks_has_the_statistics_of_all(
    model: ConsistencyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of more than 16,384 images have; here blocks of eight, the last one short."""
    monkeypatch.setattr(chunks, "GENERATED", 8)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    chosen, costs = np.array([3, 20, 27, 28, 40, 41]), []
    images: Any = SimpleNamespace(array=pixels)
    chunk = Chunk(0, 20, 21)
    computed = Work(model, Pixels(), None, 0, images, chosen).compute(
        chunk, torch.device("cpu"), costs.append
    )
    features = pixels[20:41].reshape(21, 64).astype(np.float64)
    assert computed["mean"] == pytest.approx(features.mean(0), rel=1e-12)
    assert computed["products"] == pytest.approx(20 * np.cov(features, rowvar=False), rel=1e-9, abs=1e-6)
    assert np.array_equal(computed["features"], pixels[[20, 27, 28, 40]].reshape(4, 64))
    assert sum(costs) == chunk.cost


def test_whatever_chunks_and_a_kept_reference_depend_on_is_in_their_names(model: ConsistencyModel) -> None:
    network = SimpleNamespace(name="f.pt", sha256="1", batch_size=64, path=Path("f.pt"))
    trained, configured = copy.deepcopy(model), copy.deepcopy(model)
    next(trained.parameters()).add_(0.1)
    configured.config = replace(model.config, method=replace(model.config.method, second_sigma=0.4))
    work: Any = Work(model, network, torch.arange(4), 0, None, np.arange(3))
    other_networks = [
        SimpleNamespace(**{**vars(network), name: value})
        for name, value in (("sha256", "2"), ("batch_size", 8))
    ]
    others: list[dict[str, Any]] = [
        {"model": trained},
        {"model": configured},
        *({"network": other} for other in other_networks),
        {"labels": torch.arange(4).flip(0)},
        {"seed": 1},
        {"sigmas": (0.3,)},
        {"chosen": np.arange(2)},
    ]
    keys = {replace(work, **change).key("a", 1) for change in others}
    assert len(keys | {work.key("a", 1), work.key("b", 1), work.key("a", 2)}) == len(others) + 3

    images = Images(Path("images.npy"), (9, 8, 8, 1))
    references = [Reference(Path("r"), "samples", name, images, cache=Path("kept")) for name in "ab"]
    files = [cache_files(references[0], each) for each in (network, *other_networks)]  # type: ignore[arg-type]
    files.append(cache_files(references[1], network))  # type: ignore[arg-type]
    assert len({file for [file] in files}) == 4


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 50_000, 1_281_167])
def test_chunks_hold_every_image_once(count: int) -> None:
    for found in (generated_chunks(2, count), reference_chunks(count)):
        assert [number for chunk in found for number in (chunk.first, chunk.first + chunk.count)][1:-1] == [
            chunk.first for chunk in found[1:] for _ in (0, 1)
        ]
        assert found[0].first == 0
        assert found[-1].first + found[-1].count == count
    assert len(reference_chunks(count)) <= 16


def test_the_processes_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "usable_cores", lambda: 12)
    assert processes.threads_each(3) == 4
