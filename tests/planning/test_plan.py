"""A plan's arithmetic, what it refuses, and that a measured rate takes the place of the assumed one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ict_fast import presets
from ict_fast.cli import main
from ict_fast.config import Config, to_dict
from ict_fast.consistency.curriculum import stages
from ict_fast.errors import InputError
from ict_fast.networks import build_network
from ict_fast.networks.cost import network_cost
from ict_fast.planning import Plan, make_plan
from ict_fast.planning.gpus import GPUS, described
from ict_fast.planning.launching import launch_seconds
from ict_fast.planning.measured import best_measured
from ict_fast.planning.plan import (
    DEFAULT_MFU,
    MOST_GPUS,
    RUNTIME_BYTES,
    calibrated_batches,
    choose_micro_batch,
    memory_bytes,
)
from ict_fast.training.precision import BATCHES, choice_is_due
from ict_fast.training.step import TrainStep

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_images_days_and_gpu_hours_follow_from_the_flops(gpu: str, gpus: int) -> None:
    plan = make_plan(presets.get("imagenet64"), gpu, gpus, mfu=0.5)
    peak = {"a100": 312e12, "h100": 989e12, "h200": 989e12}[gpu]
    images = 800_000 * 4096
    # 512 GPUs have eight images each, and wait for the 90 ms that launching takes.
    ideal_step = max(4096 * 4 * 219.3e9 / (0.5 * peak * gpus), 0.09 * plan.share / plan.micro_batch)
    assert plan.launch_bound == (gpus == 512)
    other = plan.exposed_seconds * 800_000 + plan.calibration_seconds
    assert plan.days - other / 86400 == pytest.approx(ideal_step * 800_000 / 86400, rel=2e-3)
    assert plan.gpu_hours == pytest.approx(plan.days * 24 * gpus)
    training = plan.days * 86400 - plan.calibration_seconds
    assert plan.images_per_second * training == pytest.approx(images)
    assert plan.share * gpus == 4096
    assert plan.share % plan.micro_batch == 0
    assert sum(plan.memory.values()) <= plan.usable_bytes < GPUS[gpu].memory
    if gpus == 1:
        assert plan.all_reduced_bytes == 0
    else:
        assert plan.all_reduced_bytes == 4 * plan.cost.parameters
        assert plan.all_reduced_bytes <= plan.wire_bytes <= 2 * plan.all_reduced_bytes


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("preset", ["cifar10", "cifar10-deep", "imagenet64"])
def test_a_run_takes_the_micro_batch_that_the_plan_has(preset: str, gpus: int) -> None:
    config = presets.get(preset)
    assert config.training.micro_batch == 0
    plan = make_plan(config, "h100", gpus)

    def chosen(asked: int, memory: float = GPUS["h100"].memory) -> tuple[int, str | None]:
        training = replace(config.training, micro_batch=asked)
        return choose_micro_batch(replace(config, training=training), plan.cost, gpus, memory)

    if plan.micro_batch == plan.share:
        assert chosen(0) == (0, None)
        assert chosen(100 * plan.share) == (100 * plan.share, None), "more than it has it does not take"
    else:
        micro_batch, said = chosen(0)
        assert micro_batch == plan.micro_batch
        assert said.startswith(f"{plan.share:,} images at a time need about ")
        assert f": it takes {micro_batch} at a time" in said
        micro_batch, said = chosen(plan.share)
        assert micro_batch == plan.share, "asked for, it is what is taken"
        assert said.endswith(f"; --training.micro-batch {plan.micro_batch} should fit")
    assert chosen(plan.micro_batch) == (plan.micro_batch, None)
    if preset == "imagenet64":
        micro_batch, said = chosen(0, 8e9)
        assert micro_batch == 0
        assert said.endswith("; not even one should fit")


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    plan = make_plan(presets.get("imagenet64"), "a100", 8)
    per_image = plan.memory["activations"] / plan.micro_batch
    larger = min(size for size in range(plan.micro_batch + 1, plan.share + 1) if plan.share % size == 0)
    assert plan.micro_batch < plan.share
    assert sum(plan.memory.values()) + (larger - plan.micro_batch) * per_image > plan.usable_bytes
    fp32 = replace(
        presets.get("imagenet64"), training=replace(presets.get("imagenet64").training, precision="fp32")
    )
    assert make_plan(fp32, "a100", 8).micro_batch < plan.micro_batch


@pytest.mark.parametrize("teacher", ["student", "ema"])
def test_what_a_run_keeps_is_what_a_training_step_holds(tiny: Config, teacher: str) -> None:
    """Tensors of the real thing, after its first step, against the plan's kinds."""
    training = replace(tiny.training, precision="bf16")
    config = replace(tiny, method=replace(tiny.method, teacher=teacher), training=training)
    plan = make_plan(config, "h100", 1)
    step = TrainStep(config, torch.device("cpu"))
    groups = step.tensors()
    names = [name for name, _ in step.network.named_parameters()]
    held = {
        "weights": sum(groups["weights"][name].nbytes for name in names),
        "EMA": sum(groups["ema"][name].nbytes for name in names),
        "optimizer": sum(t.nbytes for name, t in groups["optimizer"].items() if "exp_avg" in name),
        "gradients": sum(p.nbytes for p in step.network.parameters()),
    }
    if teacher == "ema":
        held["EMA teacher"] = sum(groups["teacher"][name].nbytes for name in names)
    assert {kind: plan.memory[kind] for kind in held} == held
    assert ("EMA teacher" in plan.memory) == (teacher == "ema")
    casts = [
        cast.nbytes
        for network in (step.network, step.teacher)
        for layer in (() if network is None else network.modules())
        for cast in (getattr(layer, "cast_weight", None), getattr(layer, "cast_bias", None))
        if cast is not None
    ]
    assert 0.7 * plan.memory["weights in half precision"] < sum(casts), "the trunk's convolutions, not all"
    assert sum(casts) < plan.memory["weights in half precision"]


def _newest_record(preset: str) -> dict[str, Any]:
    """What the newest file says of a preset's whole steps, by its date."""
    reports = [json.loads(path.read_text()) for path in RESULTS.glob("step-*-*-*.json")]
    dated = [
        (report["date"], record)
        for report in reports
        for record in report["results"]
        if record.get("preset") == preset and "ict-fast" in record["variants"]
    ]
    assert all(date.endswith("+00:00") for date, _ in dated), "such dates sort as text"
    return max(dated, key=lambda each: each[0])[1]


def _measured_and_planned_bytes(preset: str) -> tuple[float, float]:
    """The newest peak, and what the plan has for it.

    A step calibrates nothing, and torch's allocator knows nothing of the context and the libraries.
    """
    record, config = _newest_record(preset), presets.get(preset)
    with torch.device("meta"):
        cost = network_cost(build_network(config.network))
    expected = memory_bytes(config, cost, record["batch_size"])
    of_step = sum(expected.values()) - expected["calibration"] - RUNTIME_BYTES
    return record["variants"]["ict-fast"]["peak_memory_bytes"], of_step


@pytest.mark.parametrize("preset", ["imagenet64", "cifar10"])
def test_the_memory_of_a_measured_step_is_what_the_plan_says(preset: str) -> None:
    peak, of_step = _measured_and_planned_bytes(preset)
    assert 0.9 < peak / of_step <= 1, f"{peak / 1e9} of {of_step / 1e9} GB"


def test_planning_md_quotes_the_memory_of_the_newest_file() -> None:
    text = " ".join((ROOT / "docs/planning.md").read_text().split())
    quoted = re.search(
        r"ADM-64 with (\d+) images had a peak of ([\d.]+) GB, (\d+) % of the ([\d.]+) GB", text
    )
    assert quoted is not None
    images, peak, percent, planned = map(float, quoted.groups())
    measured, of_step = _measured_and_planned_bytes("imagenet64")
    assert images == _newest_record("imagenet64")["batch_size"]
    assert (peak, planned) == (round(measured / 1e9, 1), round(of_step / 1e9, 1))
    assert percent == round(100 * measured / of_step)


def test_the_results_count_one_product_more_than_the_plan_for_each_attention() -> None:
    """Queries times keys, again in flash attention's backward pass: (pixels x pixels) sums over the width."""
    config = presets.get("imagenet64").network
    products = []
    with torch.device("meta"):
        network = build_network(config)
        for layer in network.modules():
            if type(layer).__name__ == "SelfAttention":
                layer.register_forward_pre_hook(lambda _, inputs: products.append(inputs[0].shape))
        network(torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    again = sum(2 * (height * width) ** 2 * channels for _, channels, height, width in products)
    (counted,) = [
        step
        for step in json.loads((RESULTS / "step-counts.json").read_text())["steps"]
        if step["preset"] == "imagenet64"
    ]
    assert counted["flops"] == counted["batch_size"] * (network_cost(network).step_flops + again)
    said = f"has {counted['flops'] / counted['batch_size'] / 1e9:.1f} GFLOP for an image of `imagenet64`"
    assert said in (ROOT / "docs/planning.md").read_text()


def test_the_recipes_quote_the_plan() -> None:
    cifar10, imagenet64 = (
        " ".join((ROOT / f"docs/{preset}.md").read_text().split()) for preset in ("cifar10", "imagenet64")
    )
    plan = make_plan(presets.get("cifar10"), "h100", 1, results=RESULTS)
    assert f"`plan` says two days and {sum(plan.memory.values()) / 1e9:.0f} GB" in cifar10
    assert f"{plan.days:.0f} days" == "2 days"
    assert f"up to {plan.calibration_seconds / 60:.0f} minutes of that by `plan`" in cifar10
    rows = re.findall(r"\| `(imagenet64[-a-z]*)`, (\w+)[^|]* ((?:\| [\d., GB]+){4}) \|", imagenet64)
    assert len(rows) == 4
    for preset, gpu, figures in rows:
        plan = make_plan(presets.get(preset), gpu.lower(), 8, results=RESULTS)
        assert figures.strip("| ").split(" | ") == [
            f"{sum(plan.memory.values()) / 1e9:.0f} GB",
            f"{plan.micro_batch}",
            f"{plan.images_per_second:,.0f}",
            f"{plan.days:.1f}",
        ]
        assert (plan.measured is None) == (gpu != "H200")
        if (preset, gpu) == ("imagenet64", "H100"):
            assert f"up to {plan.calibration_seconds / 60:.0f} minutes on eight H100 by `plan`" in imagenet64
            assert f"{16 * plan.cost.parameters / 1e9:.1f} GB for a checkpoint" in imagenet64


def test_communication_that_computing_does_not_hide_costs_time() -> None:
    config = presets.get("imagenet64")
    assert make_plan(config, "h100", 8, mfu=0.5).exposed_seconds == 0
    config = replace(config, training=replace(config.training, batch_size=512))
    slow = replace(GPUS["h100"], link=10e9)
    plan = make_plan(config, slow, 8, mfu=0.5)
    assert plan.share == plan.micro_batch == 64
    wire = 2 * 7 / 8 * 4 * plan.cost.parameters / 10e9
    backward = 64 * plan.cost.backward_flops / (0.5 * 989e12)
    assert plan.exposed_seconds == pytest.approx(wire - backward)
    assert plan.step_seconds == pytest.approx(64 * plan.cost.step_flops / (0.5 * 989e12) + wire - backward)


@pytest.mark.parametrize(("preset", "blocks", "attentions"), [("cifar10", 33, 6), ("imagenet64", 36, 22)])
def test_launching_takes_what_was_measured_of_both_networks(
    preset: str, blocks: int, attentions: int
) -> None:
    """60 and 90 ms; the numbers of blocks are those that planning.md says."""
    with torch.device("meta"):
        network = build_network(presets.get(preset).network)
    names = [type(layer).__name__ for layer in network.modules()]
    assert (names.count("ResidualBlock"), names.count("SelfAttention")) == (blocks, attentions)
    said = {"cifar10": 0.060, "imagenet64": 0.090}[preset]
    assert launch_seconds(network) == pytest.approx(said, rel=1e-3)
    text = f"{blocks} blocks, {attentions} with attention"
    assert text in (ROOT / "docs/planning.md").read_text()


def test_a_step_takes_no_less_time_than_launching_its_kernels() -> None:
    plan = make_plan(presets.get("cifar10"), "h100", 512, mfu=0.5)
    assert plan.share == 2
    assert plan.launch_bound
    assert plan.step_seconds == pytest.approx(0.060, rel=1e-3)
    assert plan.exposed_seconds == 0, "it is hidden behind the launches of the backward pass"
    assert plan.days >= 400_000 * 0.0599 / 86400
    # In fp32 a choice of the arithmetic takes a micro-batch in pieces, here of an image.
    assert plan.calibration_seconds == pytest.approx(8 * 24 * (0.060 + 2 * 0.060), rel=1e-3)
    assert plan.warnings == (
        "a step takes about 60 ms to launch and 0.692 ms to compute: its time is the former;"
        " --training.cuda-graph is for such steps, but no rate has been measured with it",
        "too few images at a time to fill a GPU, 2: the rate will be below the assumed one",
    )
    near = make_plan(presets.get("cifar10"), "h100", 2, mfu=0.5)
    assert (near.launch_bound, near.warnings) == (False, ())


def test_a_measured_rate_holds_for_micro_batches_no_smaller_than_its_own(tmp_path: Path) -> None:
    """What the GPU has in a step, however much, does not make eight images at a time as fast as 128."""
    _results(tmp_path, preset="cifar10", images_per_second=2700.0, batch_size=64)
    config = presets.get("cifar10")

    def plan(micro_batch: int) -> Plan:
        asked = replace(config, training=replace(config.training, micro_batch=micro_batch))
        return make_plan(asked, "h200", 1, results=tmp_path)

    as_measured = plan(64)
    assert (as_measured.launch_bound, as_measured.warnings) == (False, ())
    assert as_measured.step_seconds == pytest.approx(1024 / 2700), "its launches are in the rate"
    smaller = plan(8)
    assert smaller.step_seconds == pytest.approx(128 * 0.060, rel=1e-3)
    assert [warning[:40] for warning in smaller.warnings] == [
        "a step takes about 7,678 ms to launch an",
        "too few images at a time to fill a GPU, ",
    ]


@pytest.mark.parametrize(
    ("gpu", "gpus", "gigabytes"),
    [
        ("a100", 8, 300),
        ("a100", 24, 200),  # eight adapters of 25 GB/s in each node, not one
        ("h100", 2, 450),
        ("h100", 16, 400),
        ("h100", 512, 400),
        ("h200", 12, 300),  # two nodes of six
    ],
)
def test_a_ring_over_nodes_is_as_fast_as_the_adapters_of_a_node_together(
    gpu: str, gpus: int, gigabytes: float
) -> None:
    """Three nodes of eight A100 with four adapters of 25 GB/s have been seen to do 85 to 96 GB/s."""
    assert GPUS[gpu].ring(gpus) == gigabytes * 1e9
    assert replace(GPUS["a100"], network=12.5e9).ring(24) == 100e9


def test_large_runs_hide_their_communication() -> None:
    plan = make_plan(presets.get("imagenet64"), "h100", 64)
    sent = 2 * 63 / 64 * 4 * 282.2e6 / 400e9
    backward = 64 * plan.cost.backward_flops / (DEFAULT_MFU * 989e12)
    assert plan.share == plan.micro_batch == 64
    assert sent < backward
    assert plan.exposed_seconds == 0


def _results(folder: Path, gpu: str = "NVIDIA H200", **changes: Any) -> None:
    rate = {"preset": "imagenet64", "precision": "auto", "batch_size": 128, "images_per_second": 500.0}
    slower = {**rate, "images_per_second": 400.0, "name": "uncompiled"}
    report = {
        "part": "step",
        "date": "2026-01-01T00:00:00+00:00",
        "hardware": {"gpu": gpu},
        "results": [slower, {**rate, **changes}, {"not_measured": "the budget"}],
    }
    (folder / "step-NVIDIA-H200-20260101-000000.json").write_text(json.dumps(report))
    (folder / "step-broken.json").write_text('{"part": "step"')
    (folder / "step-none.json").write_text('{"part": "step", "hardware": {}, "results": []}')


def test_a_measured_rate_takes_the_place_of_the_assumption(tmp_path: Path) -> None:
    config = presets.get("imagenet64")
    assert make_plan(config, "h200", 8, results=tmp_path).mfu == DEFAULT_MFU
    _results(tmp_path)
    plan = make_plan(config, "h200", 8, results=tmp_path)
    assert plan.measured is not None
    assert plan.measured.file == "step-NVIDIA-H200-20260101-000000.json"
    assert plan.images_per_second == pytest.approx(8 * 500)
    assert plan.mfu == pytest.approx(500 * plan.cost.step_flops / 989e12)
    # Of another GPU, another preset, another arithmetic, or when an assumption is asked for: not that one.
    fp32 = replace(config, training=replace(config.training, precision="fp32"))
    for other in (
        make_plan(config, "h100", 8, results=tmp_path),
        make_plan(presets.get("cifar10"), "h200", 8, results=tmp_path),
        make_plan(fp32, "h200", 8, results=tmp_path),
        make_plan(config, "h200", 8, mfu=0.3, results=tmp_path),
    ):
        assert other.measured is None


@pytest.mark.parametrize(
    ("date", "counts"),
    [
        ("2025-12-31T23:30:00-01:00", True),  # half an hour later
        ("2026-01-01T02:00:00+02:30", False),  # half an hour earlier
        ("2026-06-01", True),
        ("yesterday", False),
        (None, False),
    ],
)
def test_a_rate_of_the_newest_file_counts_not_a_higher_one_of_code_that_is_gone(
    tmp_path: Path, date: str | None, counts: bool
) -> None:
    _results(tmp_path)
    file = tmp_path / "step-NVIDIA-H200-20260101-000000.json"
    other = json.loads(file.read_text())
    for result, rate in zip(other["results"], (300.0, 350.0), strict=False):
        result["images_per_second"] = rate
    (tmp_path / "step-A.json").write_text(json.dumps({**other, "date": date}))
    # The newest of all, of another preset.
    for result in other["results"][:2]:
        result["preset"] = "cifar10"
    (tmp_path / "step-Z.json").write_text(json.dumps({**other, "date": "2027-01-01T00:00:00+00:00"}))
    measured = best_measured(tmp_path, "imagenet64", "h200", "auto")
    assert measured is not None
    assert (measured.file, measured.images_per_second) == (
        ("step-A.json", 350.0) if counts else (file.name, 500.0)
    )


def test_planning_md_quotes_the_rates_of_the_newest_files() -> None:
    text = " ".join((ROOT / "docs/planning.md").read_text().split())
    quoted = re.search(
        r"Of ADM-64 an H200 has made ([\d,]+) images/s, (\d+) in a step, (\d+) % of the data sheet's peak,"
        r" and of CIFAR-10's network ([\d,]+), (\d+) in a step, (\d+) %",
        text,
    )
    assert quoted is not None
    found = []
    for preset in ("imagenet64", "cifar10"):
        plan = make_plan(presets.get(preset), "h200", 1, results=RESULTS)
        assert plan.measured is not None
        record = _newest_record(preset)
        assert plan.measured.images_per_second == record["images_per_second"]
        share = record["images_per_second"] * plan.cost.step_flops / 989e12
        found += [f"{record['images_per_second']:,.0f}", str(record["batch_size"]), f"{100 * share:.0f}"]
    assert list(quoted.groups()) == found


@pytest.mark.parametrize(
    ("gpu", "name", "counts"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("h100", "NVIDIA H100 PCIe", False),
        ("h100", "NVIDIA H100 NVL", False),
        ("h100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
        ("h200", "NVIDIA H200", True),
        ("h200", "NVIDIA H200 NVL", False),
        ("h200", "NVIDIA GH200 480GB", False),
        ("a100", "NVIDIA A100-SXM4-80GB", True),
        ("a100", "NVIDIA A100-PCIE-40GB", False),
    ],
)
def test_rates_of_other_versions_of_a_gpu_do_not_count(
    tmp_path: Path, gpu: str, name: str, counts: bool
) -> None:
    _results(tmp_path, gpu=name)
    plan = make_plan(presets.get("imagenet64"), gpu, 8, results=tmp_path)
    assert (plan.measured is not None) == counts


@pytest.mark.parametrize(
    "changes",
    [{"images_per_second": None}, {"images_per_second": "500"}, {"batch_size": 0}, {"precision": []}],
)
def test_results_of_the_wrong_type_are_not_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    _results(tmp_path, **changes)
    measured = make_plan(presets.get("imagenet64"), "h200", 8, results=tmp_path).measured
    assert measured is not None
    assert measured.images_per_second == 400, "the other one in the file"


@pytest.mark.parametrize(
    ("gpu", "steps"), [("a100", 8 * 24 * (1 + 312 / 19.5)), ("h100", 8 * 24 * (1 + 989 / 67))]
)
def test_choosing_the_arithmetic_takes_the_time_of_so_many_steps_at_most(gpu: str, steps: float) -> None:
    """24 batches in bf16 and in fp32 at each of eight stages: 40 % of a run of 8,000 steps."""
    config = presets.get("imagenet64")
    plan = make_plan(config, gpu, 8)
    assert plan.calibration_seconds == pytest.approx(steps * plan.compute_seconds, rel=1e-3)
    fixed = make_plan(replace(config, training=replace(config.training, precision="bf16")), gpu, 8)
    assert fixed.calibration_seconds == 0
    assert (plan.days - fixed.days) * 86400 == pytest.approx(plan.calibration_seconds)


@pytest.mark.parametrize(
    ("curriculum", "s0", "s1", "chosen"),
    # The third has 150 stages, and is measured at 2, 4, 6, 9, 14, 21, 32, 48, 72, 108.
    [("doubling", 10, 1280, 8), ("fixed", 10, 1280, 1), ("square-root", 2, 150, 10), ("doubling", 1, 8, 4)],
)
def test_the_plan_counts_the_choices_that_a_run_makes(
    tiny: Config, curriculum: Any, s0: int, s1: int, chosen: int
) -> None:
    method = replace(tiny.method, curriculum=curriculum, s0=s0, s1=s1)
    training = replace(tiny.training, precision="auto", total_steps=4000)
    step = TrainStep(replace(tiny, method=method, training=training), torch.device("cpu"))
    step.autocast_dtype = torch.bfloat16  # as on a GPU
    for stage in stages(4000, method):
        if choice_is_due(step, stage.first_step):
            step.roundings.append({"num_scales": stage.num_scales})
    assert len(step.roundings) == chosen
    assert calibrated_batches(step.config) == BATCHES * chosen


def test_further_averages_take_memory_each_and_one_more() -> None:
    config = presets.get("imagenet64")
    optimizer = replace(config.optimizer, ema_decays=(0.999,), power_ema=(0.05, 0.1))
    plan = make_plan(replace(config, optimizer=optimizer), "h200", 8)
    assert plan.memory["further averages"] == 4 * 4 * plan.cost.parameters
    assert "further averages" not in make_plan(config, "h200", 8).memory


# ---- the command ----


def test_the_command_prints_the_plan_says_where_its_rate_is_from_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--preset", "imagenet64", "--gpus", "8", "--gpu", "h200", "--results", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    for text in (
        "282.2 M",
        "219.3 G",
        "877.1 G",
        "2.87e+21",
        "1.13 GB",
        "days",
        "GPU hours",
        "micro-batch that fits",
    ):
        assert text in said
    assert "assumed: 40 % of the peak rate" in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["step_flops_per_image"] == 877_101_809_664
    seconds = 800_000 * 4096 / written["images_per_second"] + written["calibration_seconds"]
    assert written["days"] == pytest.approx(seconds / 86400)
    _results(tmp_path)
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measured: 500 images/s on one NVIDIA H200, 128 images a step (step-NVIDIA-H200-20260101" in said


def test_a_short_run_is_given_in_seconds_and_bound_by_launching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten blocks, three with attention: 20.06 ms a step, and four times that for a batch in fp32 pieces."""
    words = ["plan", "--preset", "digits", "--gpus", "1", "--json", str(tmp_path / "plan.json")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert re.search(r"step +│ +20\.1 ms, bound by launching kernels ", said.out)
    assert re.search(r"at most 19\.3 seconds ", said.out), "8 x 24 x (1 + 4) of its steps"
    assert re.search(r"seconds +│ +43\.3 ", said.out), "1,200 steps, and those"
    assert re.search(r"weights +│ +1\.7 MB ", said.out)
    assert re.search(r"forward +│ +0\.0212 G ", said.out)
    assert "The rate is that of launching kernels, 20.1 ms for a micro-batch" in said.out
    assert "--training.cuda-graph is for such steps" in said.err
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["launch_bound"] is True
    assert written["images_per_second"] == pytest.approx(96 / written["launch_seconds"])
    assert written["days"] == pytest.approx(43.3 / 86400, rel=2e-3)


def test_a_plan_does_not_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["plan", "--gpus", "1", "--json", str(tmp_path / "config.json")]) == 2
    assert "a place for the files of a model or of a data set; choose another" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_another_gpu_is_described_by_its_memory_and_its_peak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against A100's own plan, whose memory, peak and fp32 rate are said to be those of another GPU."""
    json_file = tmp_path / "plan.json"
    words = ["plan", "--gpus", "8", "--json", str(json_file)]
    assert main([*words, "--gpu", "a100", "--results", str(tmp_path)]) == 0
    table = json.loads(json_file.read_text())
    capsys.readouterr()
    assert main([*words, "--gpu-memory", "80", "--peak", "312"]) == 0
    other = json.loads(json_file.read_text())
    said = " ".join(capsys.readouterr().out.split())
    for name in ("memory", "usable_bytes", "micro_batch", "mfu", "measured", "days", "compute_seconds"):
        assert other[name] == pytest.approx(table[name]), name
    assert other["gpu"]["peak_flops"] == table["gpu"]["peak_flops"] == 312e12
    assert "imagenet64 on 8 x GPU of 80 GB and 312 TFLOP/s, auto" in said
    assert "over PCIe at 32 GB/s" in said
    assert (
        "Assumed of this GPU: no NVLink between the GPUs of its node, but PCIe 4.0 x16 at 32 GB/s one way,"
        " and 19.5 TFLOP/s in fp32, a sixteenth of its peak." in said
    )
    assert main([*words, "--gpu-memory", "80", "--peak", "156", "--precision", "tf32"]) == 0
    in_tf32 = json.loads(json_file.read_text())
    assert in_tf32["days"] == pytest.approx(800_000 * 2 * other["compute_seconds"] / 86400)
    assert "Assumed of this GPU: no NVLink" in (said := capsys.readouterr().out)
    assert "sixteenth" not in said


def test_pcie_costs_time_where_a_micro_batch_is_small() -> None:
    config = presets.get("imagenet64")
    config = replace(config, training=replace(config.training, micro_batch=1))
    plan = make_plan(config, described(48, 155, "auto"), 8)
    wire = 2 * 7 / 8 * 4 * plan.cost.parameters / 32e9
    backward = 0.09 * plan.cost.backward_flops / plan.cost.step_flops
    assert plan.launch_bound
    assert plan.exposed_seconds == pytest.approx(wire - backward, rel=1e-2)


def test_a_plan_for_a_run_is_of_its_own_network_and_uses_no_rate_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar10 = presets.get("cifar10")
    training = replace(cifar10.training, batch_size=2048, total_steps=1000, micro_batch=2048)
    run = replace(cifar10, network=replace(cifar10.network, channels=64), training=training)
    _results(tmp_path, preset="cifar10", batch_size=32)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/config.json"
    words = ["plan", "--gpus", "8", "--gpu", "h200", "--results", str(tmp_path), "--json"]
    words += [str(tmp_path / "plan.json"), "--run", str(tmp_path / "run")]
    for config, measured in ((run, False), (replace(run, network=cifar10.network), True)):
        file.write_text(json.dumps(to_dict(config)))
        assert main(words) == 0
        planned = json.loads((tmp_path / "plan.json").read_text())
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_network(config.network).parameters())
        assert planned["cost"]["parameters"] == parameters
        assert (planned["batch_size"], planned["total_steps"]) == (2048, 1000)
        assert planned["micro_batch"] == planned["share"] == 256
        assert (planned["measured"] is not None) == measured
    file.write_text("{")
    capsys.readouterr()
    assert main(words) == 2
    assert f"--run {tmp_path / 'run'}: there is no run, or it cannot be read" in capsys.readouterr().err


def test_a_plan_warns_of_an_average_that_the_run_is_too_short_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for steps, warned in (("20000", True), ("400000", False)):
        assert main(["plan", "--preset", "cifar10", "--gpus", "8", "--total-steps", steps]) == 0
        assert ("25 % with a decay of 0.99993" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h20"], 'h20"; did you mean "h200"'),
        (["--gpu", "tpu"], "choose one of: a100, h100, h200"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--gpus", str(MOST_GPUS + 1)], "a plan is for 1 to 512"),
        (["--gpus", "7"], "error: --batch-size is 4096; it must be a multiple of --gpus 7"),
        (["--micro-batch", "100"], "--micro-batch is 100; it must divide the 512 images that each GPU has"),
        (["--micro-batch", "1024"], "--micro-batch is 1024; it must divide the 512 images that each GPU has"),
        (["--micro-batch", "4", "--gpus", "512", "--batch-size", "3072"], "must divide the 6 images"),
        (["--preset", "imagnet64"], 'there is no preset "imagnet64"; did you mean "imagenet64"'),
        (["--mfu", "1.2"], "--mfu is 1.2; it must be a share"),
        (["--micro-batch", "512", "--gpu", "h100"], "needs 110 GB on each GPU for 512 images"),
        (["--peak", "165"], "--peak describes a GPU together with --gpu-memory; give both, or --gpu"),
        (["--gpu-memory", "24"], "--gpu-memory describes a GPU together with --peak; give both, or --gpu"),
        (
            ["--peak", "9", "--gpu-memory", "24", "--gpu", "a100"],
            "--gpu is a100, but --gpu-memory and --peak",
        ),
        (["--peak", "9", "--gpu-memory", "24", "--results", "."], "--results is ., but --gpu-memory and"),
        (
            ["--peak", "165e12", "--gpu-memory", "24"],
            "--peak is 1.65e+14; it must be above 0 and at most 10,000",
        ),
        (
            ["--peak", "165", "--gpu-memory", "0"],
            "--gpu-memory is 0; it must be above 0 and at most 1,000 GB",
        ),
        (["--peak", "165", "--gpu-memory", "nan"], "--gpu-memory is nan; it must be above 0"),
        (["--peak", "165", "--gpu-memory", "24", "--gpus", "16"], "a plan is for 1 to 8, in one node"),
        (["--run", "runs/none"], "there is no run or checkpoint at runs/none"),
        (["--run", "/dev", "--preset", "digits"], "--preset is digits and --run is /dev; give one of them"),
        (["--json", "/dev/null/plan.json"], "--json is /dev/null, but /dev/null is not a folder"),
        (["--json", "/"], "--json is /, a folder; name a file to write, such as /plan.json"),
        (["--results", "/dev/null"], "--results is /dev/null, which is no folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_preset_has_a_plan() -> None:
    for name in presets.names():
        config = presets.get(name)
        assert make_plan(config, "a100", 8).days > 0
        with pytest.raises(InputError, match="--batch-size is 96; it must be a multiple of --gpus 5"):
            make_plan(replace(config, training=replace(config.training, batch_size=96)), "a100", 5)
