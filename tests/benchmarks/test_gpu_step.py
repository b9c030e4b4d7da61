"""Part step of run_gpu.py: which variants are measured, in which order, and what is no figure."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ict_fast.config import Config
from ict_fast.networks import build_network
from ict_fast.networks.layers import NearestUpsample, ResidualBlock

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

gpu_step_blocks: Any = importlib.import_module("gpu_step_blocks")
gpu_step: Any = importlib.import_module("gpu_step")
floor: Any = importlib.import_module("gpu_step_floor")
step_timing: Any = importlib.import_module("step_timing")
variants: Any = importlib.import_module("gpu_step_variants")
run_gpu: Any = importlib.import_module("run_gpu")

CPU = torch.device("cpu")


@pytest.fixture
def measured_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The record of both variants of the digits' step at 32 images; `fits(name, images)` says what runs."""

    def measure(fits: Callable[[str, int], bool], budget: float = 600.0) -> dict[str, Any]:
        def time_variant(name: str, config: Any, device: torch.device) -> dict[str, Any]:
            images = config.training.batch_size
            if not fits(name, images):
                raise torch.OutOfMemoryError("CUDA out of memory")
            figures: dict[str, Any] = {"pass": {"ms_all": [float(images)], "host_ms": 1.0}}
            return figures | {"first_step_s": 1.0, "parameters": 1, "peak_memory_bytes": None}

        monkeypatch.setattr(gpu_step, "_time_variant", time_variant)
        monkeypatch.setattr(gpu_step, "ceilings", lambda kind: {"matrix_tflop_per_s": {"fp32": 1.0}})
        monkeypatch.setattr(gpu_step, "count_step", lambda preset, images: {"flops": 1e9 * images})
        *_, record = gpu_step.measure_steps("digits", 32, CPU, budget)
        return dict(record)

    return measure


def test_a_baseline_that_does_not_fit_takes_all_variants_to_half_the_batch(
    measured_steps: Callable[..., dict[str, Any]],
) -> None:
    record = measured_steps(lambda name, images: name != variants.PLAIN or images <= 16)
    assert record["batch_size"] == 16
    assert {name: each["ms_per_step"] for name, each in record["variants"].items()} == dict.fromkeys(
        gpu_step.CPU_VARIANTS, 16.0
    )
    assert record["failed"] == record["left_out"] == {}
    assert "error" not in record
    assert record["larger_batches"]["32"].keys() == {gpu_step.CPU_VARIANTS[0]}
    late = measured_steps(lambda name, images: name != variants.PLAIN or images <= 16, budget=0.0)
    assert late["batch_size"] == 32, "without time for all variants, those that ran keep their figures"
    assert late["variants"].keys() == {gpu_step.CPU_VARIANTS[0]}


def test_variants_that_all_fail_are_an_error(
    measured_steps: Callable[..., dict[str, Any]],
) -> None:
    record = measured_steps(lambda name, images: False)
    assert "out of memory at 8 images" in record["error"]


def test_max_autotune_has_to_be_asked_for_and_goes_by_another_name(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    session = run_gpu.Session(tmp_path, 1.0)
    assert list(gpu_step.part_step(gpu, session)) == ["step, imagenet64", "step, cifar10"]
    session.variants = ["ours", "max-autotune"]
    named = ["step, imagenet64, max-autotune", "step, cifar10, max-autotune"]
    assert list(gpu_step.part_step(gpu, session)) == named


def test_the_variant_as_written_convolves_after_upsampling(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"embedding_channels": 4, "eps": 1e-5, "adaptive_norm": False, "dropout": 0.0}
    block = ResidualBlock(4, 8, **settings, resample=NearestUpsample())
    step = SimpleNamespace(network=SimpleNamespace(blocks=lambda: iter([block])))
    monkeypatch.setattr(variants, "_ours", lambda *_: (step, step))
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert block._convolves_before_upsampling(on_gpu)
    variants.VARIANTS[variants.AS_WRITTEN](Config(), torch.device("cuda"))
    assert not block._convolves_before_upsampling(on_gpu)


def test_variants_are_chosen_by_words_and_another_word_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(
        gpu_step, "measure_steps", lambda *arguments: chosen.extend(arguments[-1]) or iter([{"summary": ""}])
    )
    words = ["--part", "step", "--out", str(tmp_path), "--variants"]
    assert run_gpu.main([*words, "floor", "ours"]) == 0
    assert chosen == [gpu_step.OURS, gpu_step.FLOOR], "in the order of measuring"
    with pytest.raises(SystemExit) as stopped:
        run_gpu.main([*words, "our"])
    assert stopped.value.code == 2
    assert "ours, floor, tuned, inductor, plain" in capsys.readouterr().err


@pytest.fixture
def steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """The records of measure_steps on a GPU where a variant's first pass takes `seconds`, another half."""

    def measure(seconds: dict[str, float], budget: float, *names: str) -> list[dict[str, Any]]:
        clock, passed = [0.0], set()

        def time_variant(name: str, config: Any, device: torch.device) -> dict[str, Any]:
            clock[0] += seconds[name] / (2 if name in passed else 1)
            passed.add(name)
            figures: dict[str, Any] = {"pass": {"ms_all": [10.0], "host_ms": 1.0}}
            return figures | {"first_step_s": 1.0, "parameters": 1, "peak_memory_bytes": 1}

        def floor(preset: str, images: int, device: Any, left: Callable[[], float]) -> Iterator[Any]:
            for share in (0.5, 1.0):
                clock[0] += 5.0
                yield {"ms": 8.0 * share, "share_of_flops": share}

        def compile_beforehand(name: str, config: Any, most: float) -> dict[str, Any]:
            clock[0] += min(20.0, most)
            return {"seconds": min(20.0, most)}

        fakes = {
            "_time_variant": time_variant,
            "measure_floor": floor,
            "compile_beforehand": compile_beforehand,
        }
        fakes |= {"clean_up": lambda device: None}
        fakes["ceilings"] = lambda kind: {"matrix_tflop_per_s": {"bf16": 1.0}}
        fakes["count_step"] = lambda preset, images: {"flops": 1e9}
        fakes["trunk_dtype"] = lambda precision, device: torch.bfloat16
        for name, fake in fakes.items():
            monkeypatch.setattr(gpu_step, name, fake)
        monkeypatch.setattr(gpu_step.time, "monotonic", lambda: clock[0])
        found = gpu_step.measure_steps("digits", 32, SimpleNamespace(type="cuda"), budget, names)
        return [copy.deepcopy(each) for each in found]

    return measure


def test_ours_comes_first_then_the_floor_and_what_the_time_does_not_reach_is_the_rest(
    steps_on_a_gpu: Callable[..., list[dict[str, Any]]],
) -> None:
    uncompiled = variants.PLAIN, variants.PLAIN_NCHW, variants.UNCOMPILED
    seconds = dict.fromkeys(gpu_step.VARIANTS, 40.0) | dict.fromkeys(uncompiled, 5.0)
    records = steps_on_a_gpu(seconds, 169.0)
    measured = [gpu_step.OURS, variants.TUNED, *uncompiled[:2], variants.CAPTURED]
    found = [list(each["variants"]) for each in records[:5]]
    assert found == [*[measured[:1]] * 3, measured[:2], measured[:3]]
    # Before the last of the floor its sum is of a part, and says so.
    assert [each["floor"]["share_of_flops"] for each in records[1:3]] == [0.5, 1.0]
    assert records[2]["times_the_floor"] == 10.0 / 8.0
    # After 10 + 2 x 20 + 2 x 40 s no other fits, of which 20 s are compiling, and half as long for its steps;
    # but what is not compiled does, and what has been.
    assert list(records[-1]["variants"]) == measured
    assert list(records[-1]["left_out"]) == [variants.INDUCTOR]
    assert list(records[-1]["compiled_beforehand"]) == [gpu_step.OURS, variants.TUNED]


def test_a_second_pass_takes_half_and_the_floor_alone_can_be_measured(
    steps_on_a_gpu: Callable[..., list[dict[str, Any]]],
) -> None:
    seconds = dict.fromkeys(gpu_step.VARIANTS, 40.0)
    record = steps_on_a_gpu(seconds, 139.0, gpu_step.OURS, variants.TUNED)[-1]
    passes = {name: len(each["passes"]) for name, each in record["variants"].items()}
    assert passes == {gpu_step.OURS: 1, variants.TUNED: 1}  # 2 x 60 s, and 19 s are left
    record = steps_on_a_gpu(seconds, 155.0, gpu_step.OURS, variants.TUNED)[-1]
    assert [len(each["passes"]) for each in record["variants"].values()] == [1, 2]
    record = steps_on_a_gpu(seconds, 100.0, gpu_step.FLOOR)[-1]
    assert record["floor"]["ms"] == 8.0
    assert "error" not in record


def test_times_of_steps_that_were_skipped_or_lost_their_loss_are_no_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def state(skipped: int, finite: int) -> Any:
        network = torch.nn.Linear(1, 1)
        optimizer, losses = SimpleNamespace(skipped=skipped), SimpleNamespace(count=finite)
        return SimpleNamespace(network=network, optimizer=optimizer, losses=losses)

    monkeypatch.setattr(gpu_step, "synthetic_batches", lambda config, device: [])
    for found, problem in (((0, 16), None), ((1, 16), "1 steps skipped"), ((0, 15), "15 of the losses")):
        variant = lambda config, device, found=found: (lambda step, batches: None, state(*found))  # noqa: E731
        monkeypatch.setitem(gpu_step.VARIANTS, gpu_step.OURS, variant)
        with pytest.raises(FloatingPointError, match=problem) if problem else nullcontext():
            gpu_step._time_variant(gpu_step.OURS, None, CPU)


@pytest.mark.parametrize(("name", "resets"), [(gpu_step.OURS, [0, 5]), (gpu_step.CAPTURED, [0])])
def test_peak_memory_is_of_steps_after_the_first_ones_unless_they_are_captured(
    name: str, resets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    seen: list[int] = []
    state = SimpleNamespace(
        network=torch.nn.Linear(1, 1),
        optimizer=SimpleNamespace(skipped=0),
        losses=SimpleNamespace(count=16),
    )
    monkeypatch.setitem(
        gpu_step.VARIANTS, name, lambda config, device: (lambda k, batches: ran.append(k), state)
    )
    monkeypatch.setattr(gpu_step, "synthetic_batches", lambda config, device: [])
    monkeypatch.setattr(gpu_step, "seconds_of", lambda run, device: run() or 1.0)
    monkeypatch.setattr(gpu_step, "_matrix_rate", lambda device: None)
    profiled: list[int] = []
    monkeypatch.setattr(
        gpu_step, "profile_steps", lambda run, steps, device: (profiled.extend(steps) or {}, None)
    )
    monkeypatch.setattr(
        gpu_step,
        "time_steps",
        lambda step, numbers, device: step_timing.StepTimes([step(k) or 1.0 for k in numbers], [1.0]),
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append(len(ran)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert gpu_step._time_variant(name, None, SimpleNamespace(type="cuda"))["peak_memory_bytes"] == 7
    assert (seen, len(ran)) == (resets, 16)
    assert profiled == [16, 17], "after what is timed"


def test_the_floor_times_convolutions_where_a_step_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass's within one: there autograd's own thread calls it on a GPU."""
    within: list[bool] = []

    def time_call(call: Any, device: Any) -> float:
        within.append(torch._C._current_graph_task_id() != -1)
        return 1.5

    monkeypatch.setattr(floor, "time_call", time_call)
    for operation in ("convolution", "convolution_backward", "attention backward"):
        assert floor._where_a_step_calls_it(SimpleNamespace(operation=operation), CPU) == 1.5
    assert within == [False, True, False]


def test_every_kind_of_block_is_compiled_beforehand_for_the_images_that_it_sees() -> None:
    config = gpu_step.step_config("imagenet64", 128)
    with torch.device("meta"):
        network = build_network(config.network)
    blocks = list(network.blocks())
    decoding = {blocks.index(block) for level in network.decoder for block in level.blocks}

    def kind(block: Any) -> tuple[Any, ...]:
        resample, attention = type(block.resample), block.attention is not None
        return block.in_channels, block.out_channels, resample, attention, block.norm1.dropout

    sides: dict[Any, set[int]] = {}
    for name in gpu_step_blocks.COMPILED:
        work = [each.args for each in gpu_step_blocks.block_work(name, config)]
        assert {kind(blocks[number]) for _, _, number, *_ in work} == set(map(kind, blocks))
        for _, _, number, _, (samples, channels, height, width), skip in work:
            brought = skip[1] if skip else 0
            assert (samples, channels) == (128, blocks[number].in_channels - brought)
            assert (skip is not None) == (number in decoding)
            assert skip is None or skip == (samples, brought, height, width)
            assert height == width
            sides.setdefault(blocks[number].attention is not None, set()).add(height)
    assert sides[True] <= set(config.network.attention_resolutions) | {8}, "the middle attends too"
    ours = gpu_step_blocks.block_work(gpu_step.OURS, config)
    # A place of dropout has its number in its code.
    dropping = sum(block.norm1.dropout > 0 for block in blocks)
    assert dropping < len(ours) < len(blocks)


def test_blocks_are_compiled_beforehand_with_the_seed_that_the_first_of_their_kind_has_in_a_step() -> None:
    """On a GPU the key of a backward pass in Inductor's cache says where its seed stands among all."""
    config = gpu_step.step_config("cifar10", 8)
    with torch.device("meta"):
        network = build_network(config.network)
        arguments = torch.empty(8, 3, 32, 32), torch.empty(8)
        seed = torch.empty(2, dtype=torch.int64)
    places: dict[Any, tuple[int, int]] = {}

    def note(block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        skip = named.get("skip_nchw")
        kind = repr(block), inputs[0].shape, skip is not None and skip.shape
        places.setdefault(kind, (inputs[2].storage_offset(), inputs[2].untyped_storage().nbytes()))

    for block in network.blocks():
        block.register_forward_pre_hook(note, with_kwargs=True)
    network(*arguments, dropout_seed=seed)
    blocks, found = list(network.blocks()), {}
    for _, _, number, turn, shape, skip in (
        each.args for each in gpu_step_blocks.block_work("ict-fast", config)
    ):
        ours = gpu_step_blocks.seed_of(network, turn, torch.device("meta"))
        kind = repr(blocks[number]), shape, skip is not None and skip
        found[kind] = ours.storage_offset(), ours.untyped_storage().nbytes()
    assert found == places
    assert len(set(found.values())) == len(found)


def test_what_could_not_be_compiled_beforehand_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = ["ended", "ValueError: no such shape", "given up", "ValueError: no such shape"]
    monkeypatch.setattr(gpu_step_blocks, "block_work", lambda name, config: [print] * 4)
    monkeypatch.setattr(gpu_step_blocks, "compile_beside", lambda work, seconds: outcomes)
    found = gpu_step_blocks.compile_beforehand(gpu_step.OURS, None, 1.0)
    assert (found["blocks"], found["ended"], found["errors"]) == (4, 1, [outcomes[1]])
    assert capsys.readouterr().err.count("compiled beforehand: ValueError: no such shape") == 1
