"""RESULTS.md says what the raw JSON says, and nothing else."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

goals: Any = importlib.import_module("goals")
made_up: Any = importlib.import_module("made_up")
render: Any = importlib.import_module("render")
results_index: Any = importlib.import_module("results_index")
categories: Any = importlib.import_module("step_categories")


def test_the_committed_page_is_what_the_json_says(tmp_path: Path) -> None:
    text = render.render(results_index.Results(RESULTS), tmp_path / "plots")
    committed = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    assert text == committed, "`make results` renders it anew"
    drawn = {path.name for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == {path.name for path in (RESULTS / "plots").glob("*.png")}


def test_every_file_that_the_page_cites_is_there() -> None:
    page = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    cited = re.findall(r"\]\((results[^)]*)\)", page)
    assert cited
    for path in cited:
        assert (ROOT / "benchmarks" / path).exists(), path


def test_every_miss_of_the_committed_results_is_analysed() -> None:
    results = results_index.Results(RESULTS)
    written = render.analyses(RESULTS)
    assert [goal.key for goal, _ in render.missed(results) if not written.get(goal.key)] == []
    assert written.keys() <= {goal.key for goal in goals.GOALS}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A page of made-up results, and their folder."""
    folder = tmp_path_factory.mktemp("made-up") / "results"
    folder.mkdir()
    made_up.write_results(folder)
    (folder / "digits-demo.json").write_text((RESULTS / "digits-demo.json").read_text())
    render.main(["--results", str(folder)])
    return (folder.parent / "RESULTS.md").read_text(), folder


def goal_row(text: str, key: str) -> str:
    (goal,) = (each for each in goals.GOALS if each.key == key)
    return next(line for line in text.splitlines() if line.startswith(f"| {goal.text} |"))


@pytest.mark.parametrize(
    ("key", "figure", "met"),
    [
        # 1 / 1.15 of a copy; the fastest baseline takes 1.3 / 1.15 of our time.
        ("norm-copy", "87 %", "yes"),
        ("norm-dropout-copy", "87 %", "yes"),
        ("norm-baseline", "1.13x", "yes"),
        ("loss-eager", "4x", "**no**"),
        # In a CUDA graph it is 4.5 times faster.
        ("optimizer-foreach", "4x", "in part: 1 of 2"),
        ("step-floor", "1.25x", "yes"),
        ("step-inductor", "1.15x", "yes"),
        ("step-tuned", "1.04x", "**no**"),
        ("step-matrix-rate", "36.6 %", "**no**"),
        # A network's case that the run did not get to.
        ("optimizer-copy", "95 %", "in part: 1 of 2"),
        ("gpu-tests", "0 (", "yes"),
    ],
)
def test_a_goal_is_judged_by_its_worst_figure(
    page: tuple[str, Path], key: str, figure: str, met: str
) -> None:
    row = goal_row(page[0], key)
    assert figure in row
    assert f"| {met} |" in row


def test_inductor_is_found_by_both_of_its_names() -> None:
    for name in ("inductor", "inductor, mix_order_reduction off"):
        record = {"times_faster_than": {name: 1.2, f"{name}, other": 2.0}}
        assert goals._step_against("inductor")(record) == 1.2
    assert goals._step_against("inductor")({}) is None


def test_what_the_newest_step_did_not_get_to_is_of_an_earlier_one_and_says_so(
    page: tuple[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(page[1], folder)
    [step] = folder.glob("step-*.json")
    report = json.loads(step.read_text())
    record = next(each for each in report["results"] if each["name"] == "step, imagenet64")
    ratios = record["times_faster_than"]
    record["times_faster_than"] = {name: ratio for name, ratio in ratios.items() if "raised" in name}
    del record["floor"], record["times_the_floor"]
    report |= {"date": "2099" + report["date"][4:], "commit": "newer"}
    (folder / step.name.replace("-20", "-newer-20", 1)).write_text(json.dumps(report))
    render.main(["--results", str(folder)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert re.search(r"1\.15x \(.*; \w+, older kernels\)", goal_row(text, "step-inductor"))
    assert "1.04x" in goal_row(text, "step-tuned")
    assert "older" not in goal_row(text, "step-tuned")
    assert "not measured" in goal_row(text, "step-floor"), "of other code it would be another floor"


def test_a_miss_has_a_place_for_its_analysis_until_somebody_writes_it(
    page: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = page
    missed = text.split("### What falls short")[1].split("\n## ")[0]
    assert missed.count("* **") == 3
    assert missed.count(render.MISSING) == 3
    (folder / "analysis.md").write_text("# Why\n\n## step-tuned\n\nIt is bound by convolutions.\n")
    render.main(["--results", str(folder)])
    again = (folder.parent / "RESULTS.md").read_text()
    assert "1.04x on Made-up GPU. It is bound by convolutions." in again
    assert again.count(render.MISSING) == 2
    assert "step-tuned" not in capsys.readouterr().err


def test_what_has_no_json_is_not_measured_yet(page: tuple[str, Path], tmp_path: Path) -> None:
    empty = render.render(results_index.Results(tmp_path), tmp_path / "plots")
    assert empty.count(render.NOT_YET) >= len(goals.GOALS) + len(results_index.PARTS)
    assert not (tmp_path / "plots").exists()
    text = page[0]
    assert "#### In other code bases\n\nnot measured yet" in text
    assert "| 11 | 0.9000 | 0.9500 | 0.8765 | 0.1000 |" in text
    assert "noise_images, cifar10: the budget of 420 s was used up" in text
    assert "| a norm | 21.5 | 30.2 |" in text
    assert "takes 1.25 times that, and 1.18 times the same calls as one sequence" in text  # 1 / 0.85


def test_every_plot_is_drawn_and_shown(page: tuple[str, Path]) -> None:
    text, folder = page
    shown = set(re.findall(r"\(results/plots/([^)]+)\)", text))
    assert {name.split("-")[0] for name in shown} == {"kernels", "steps", "profile", "train"}
    for name in shown:
        assert (folder / "plots" / name).stat().st_size > 10_000


def test_a_later_run_replaces_what_it_measured_and_nothing_else(tmp_path: Path) -> None:
    made_up.write_results(tmp_path)
    (first,) = tmp_path.glob("optimizer-*.json")
    report = json.loads(first.read_text())
    report["date"] = "2020-02-02T00:00:00+00:00"
    report["results"] = [
        {"name": "RAdamEMA, cifar10", "not_measured": "the budget of 1 s was used up"},
        {"name": "RAdamEMA, imagenet64", "stages": {}},
    ]
    (tmp_path / "optimizer-later.json").write_text(json.dumps(report))
    (machine,) = results_index.Results(tmp_path).machines.values()
    found = {name: entry.file for name, entry in machine.parts["optimizer"].items()}
    assert found == {"RAdamEMA, cifar10": first.name, "RAdamEMA, imagenet64": "optimizer-later.json"}


def reached(folder: Path, key: str) -> list[tuple[float, str]]:
    (goal,) = (each for each in goals.GOALS if each.key == key)
    return [(each.value, goal.verdict(each)) for each in goal.figures(results_index.Results(folder))]


def rerun(folder: Path, part: str, results: list[dict[str, Any]], **changed: Any) -> str:
    """A report of the made-up GPU, a year later; its file's name."""
    report = json.loads(next(folder.glob(f"{part}-Made*.json")).read_text())
    report |= {"part": part, "date": "2021-01-01T00:00:00+00:00", "commit": "1111111", "results": results}
    (folder / f"{part}-again.json").write_text(json.dumps(report | changed))
    return f"{part}-again.json"


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # The sanitizer has passed.
        ({"passed": 90, "skipped": 3}, [(0, "yes")]),
        ({"passed": 90, "not run": 6}, [(0, "in part: 91 of 97")]),
        ({"passed": 90, "failed": 1, "error": 1}, [(2, "**no**")]),
        ({"skipped": 93}, [(0, "yes")]),
        ({"not run": 93}, [(0, "in part: 1 of 94")]),
        ({}, [(0, "in part: 1 of 2")]),
    ],
)
def test_tests_that_did_not_run_have_not_passed(
    counts: dict[str, int], expected: list[tuple[float, str]], tmp_path: Path
) -> None:
    made_up.write_results(tmp_path)
    failed = {"error": "some failed"} if "failed" in counts else {}
    sanitizer = {"name": "compute-sanitizer, memcheck", "counts": {"passed": 1}}
    rerun(tmp_path, "tests", [{"name": "tests/gpu/test_noising.py", "counts": counts, **failed}, sanitizer])
    assert reached(tmp_path, "gpu-tests") == expected


def test_every_test_is_of_its_commit_and_of_older_kernels_if_these_have_changed(tmp_path: Path) -> None:
    made_up.write_results(tmp_path)
    sources = importlib.import_module("machine").kernel_sources()
    sanitizer = {"name": "compute-sanitizer, memcheck", "counts": {"passed": 1}, "summary": "clean"}
    kernels = sorted(categories.OUR_KERNELS - {"fir_up"})
    rerun(tmp_path, "tests", [sanitizer | {"kernels": kernels}], kernels=sources)
    text = render.render(results_index.Results(tmp_path), tmp_path / "plots")
    assert "| compute-sanitizer, memcheck | clean; not fir_up | 1111111 |" in text
    assert "| tests/gpu/test_noising.py | 90 passed, 3 skipped | 0000000, older kernels |" in text
    assert "0 (Made-up GPU; commit: 1111111; older kernels: 0000000)" in goal_row(text, "gpu-tests")


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ('"""Another."""\n# Said\nONE = 1\n\n\ndef f():\n    """It\n    says."""\n    return ONE\n', True),
        ('"""One."""\nONE = 2\ndef f():\n    return ONE\n', False),
        ('"""One."""\nONE = 1\ndef f():\n    return ONE, "as said"\n', False),
    ],
)
def test_kernels_are_older_if_their_code_has_changed_not_what_is_said_of_it(
    tmp_path: Path, now: str, same: bool
) -> None:
    digest = importlib.import_module("machine").digest_of_code
    (tmp_path / "one.py").write_text('"""One."""\nONE = 1\ndef f():\n    return ONE\n')
    before = digest(tmp_path)
    (tmp_path / "one.py").write_text(now)
    assert (digest(tmp_path) == before) is same


def test_a_goal_is_met_in_part_where_a_baseline_failed_or_a_case_was_not_measured(tmp_path: Path) -> None:
    made_up.write_results(tmp_path)
    cases = made_up.kernel_results()
    assert [verdict for _, verdict in reached(tmp_path, "norm-baseline")] == ["yes"]
    cases[3]["failed"] = {"inductor": "RuntimeError: no kernel"}
    rerun(tmp_path, "kernels", cases)
    failed = "in part: 12 of 12; failed: inductor"
    assert [verdict for _, verdict in reached(tmp_path, "norm-baseline")] == [failed]
    (whole,) = tmp_path.glob("kernels-Made*.json")
    offered = [each["name"] for each in cases]
    rerun(tmp_path, "kernels", cases[:1], offered=offered, complete=False)
    whole.unlink()  # what is left is a run that was killed after its first case
    assert [verdict for _, verdict in reached(tmp_path, "norm-baseline")] == ["in part: 1 of 12"]


def test_a_run_that_failed_hides_no_figure_and_is_named(tmp_path: Path) -> None:
    made_up.write_results(tmp_path)
    (first,) = tmp_path.glob("optimizer-*.json")
    again = rerun(tmp_path, "optimizer", [{"name": "RAdamEMA, cifar10", "error": "OutOfMemoryError: 9 GiB"}])
    (machine,) = results_index.Results(tmp_path).machines.values()
    entry = machine.parts["optimizer"]["RAdamEMA, cifar10"]
    assert (entry.file, entry.failed_since.file) == (first.name, again)
    text = render.render(results_index.Results(tmp_path), tmp_path / "plots")
    assert f"a later run failed: OutOfMemoryError: 9 GiB ([{again}]" in text


def test_every_figure_is_credited_to_the_file_and_commit_that_it_is_from(tmp_path: Path) -> None:
    made_up.write_results(tmp_path)
    (first,) = tmp_path.glob("kernels-*.json")
    again = rerun(tmp_path, "kernels", made_up.kernel_results()[:1], versions={"torch": "1", "triton": "0"})
    text = render.render(results_index.Results(tmp_path), tmp_path / "plots")
    section = text.split("#### Kernels")[1].split("####")[0]
    assert section.count("commit 1111111") == section.count("commit 0000000") == 1
    assert section.count("torch 1,") == 1
    case = made_up.kernel_results()[0]["name"]
    rows = [line for line in section.splitlines() if line.startswith("| group_norm_silu")]
    assert len(rows) == 12 * (2 + 1), "two directions and an error"
    for row in rows:
        newer = row.startswith(f"| {case} |")
        assert (again if newer else first.name) in row
        assert (first.name if newer else again) not in row


def test_an_optimizers_time_on_the_device_and_from_python_are_told_apart(page: tuple[str, Path]) -> None:
    section = page[0].split("#### Optimizer")[1].split("####")[0]
    head, _, ours, *_ = section.split("where the host may be")[1].split("\n\n")[1].splitlines()
    assert "device time, queued, ms | called from Python, ms" in head
    assert ours.startswith("| RAdamEMA, cifar10 | ict_kernels | 2.000 | 2.250 |")
    assert "a copy of 38 bytes per parameter, as the goal is stated, where RAdamEMA moves 40" in section


def test_a_share_of_the_link_that_nobody_measured_is_empty(page: tuple[str, Path]) -> None:
    rows = [line.split(" | ") for line in page[0].splitlines() if line.startswith("| loaders, 64x64")]
    assert [(row[1], row[3].strip(" |")) for row in rows] == [
        ("resident", ""),
        ("memmap", "20 %"),
        ("dali", ""),
    ]


def test_the_readmes_figures_are_the_results() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    demo = json.loads((RESULTS / "digits-demo.json").read_text())
    noise, one_step = demo["reference"]["noise"], demo["one_step"]["frechet_distance"]
    precision = json.loads((RESULTS / "precision.json").read_text())["stages"][-1]
    bf16, fp16, tf32 = (precision["precisions"][name] for name in ("bf16", "fp16", "tf32"))
    halves, images = demo["reference"]["halves"] / noise, demo["reference"]["count"]
    bias = halves * (1 / demo["count"] + 1 / images) / (1 / (images // 2) + 1 / (images - images // 2))
    features = demo["features"]["num_features"]
    runs = json.loads((RESULTS / "last-stages.json").read_text())["runs"]
    last = {(run["precision"], run["seed"]): run["after"]["1281"] for run in runs}

    def raised(precision: str, steps: str = "one_step") -> tuple[float, float]:
        """Mean difference from fp32 with the same seed, and its standard error."""
        found = [last[precision, seed][steps] - last["fp32", seed][steps] for seed in range(3)]
        return statistics.mean(found), statistics.stdev(found) / 3**0.5

    for precision_name in ("bf16", "fp16"):
        mean, _ = raised(precision_name, "two_step")
        assert mean <= 0.0, "in two steps neither does"
    claims = (
        f"to the {images:,} training images, in {features} features of a classifier of the same digits,"
        f" is {one_step:.2f}, which is {100 * one_step / noise:.2f} % of that of uniform noise",
        f"is at {100 * demo['reference']['gaussian'] / noise:.1f} %",
        f"{100 * halves:.2f} % between two halves of the real digits, {100 * bias:.2f} % at 10,000 samples",
        f"at N = {precision['num_scales']}, bf16 rounding adds gradient variance equal to"
        f" {100 * bf16['noise']:.0f} % of the minibatch variance",
        f"shrinks the mean gradient by {100 * (1 - bf16['norm']):.0f} %",
        "by {:.3f} ± {:.3f} % of noise (paired".format(*raised("bf16")),
        "fp16 by {:.3f} ± {:.3f} %; in two".format(*raised("fp16")),
        f"fp16 {100 * fp16['noise']:.1f} % and {100 * (1 - fp16['norm']):.1f} %",
        f"TF32 {100 * tf32['noise']:.1f} % and {100 * (1 - tf32['norm']):.1f} %",
    )
    assert [claim for claim in claims if claim not in readme] == []


def test_the_readmes_training_steps_are_those_of_the_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| network, batch | commit |")[1].split("\n\n")[0].splitlines()[2:]
    presets = {"ADM-64": "imagenet64", "NCSN++ (CIFAR-10)": "cifar10"}
    variants = {
        "`torch.compile`, raised thresholds": "inductor, raised thresholds",
        "`torch.compile`, defaults": "inductor",
        "uncompiled": "torch, uncompiled",
    }
    above = [""] * 4
    rates = []
    for row in table:
        found = [cell.strip() for cell in row.strip("|").split("|")]
        above = [cell or before for cell, before in zip(found[:4], above, strict=True)]
        network, commit, rate, share = above
        name, batch = network.rsplit(", ", 1)
        baseline = found[4].partition(";")[0]
        (record,) = (
            result
            for path in RESULTS.glob("step-NVIDIA-H200-*.json")
            if (report := json.loads(path.read_text()))["commit"] == commit
            for result in report["results"]
            if result.get("preset") == presets[name] and variants[baseline] in result.get("variants", ())
        )
        ours, theirs = record["variants"]["ict-fast"], record["variants"][variants[baseline]]
        copied = sum(
            each["ms"] for each in theirs["profile"]["top"] if categories.is_copy_of_layout(each["name"])
        )
        faster = theirs["ms_per_step"] / ours["ms_per_step"]
        without = (theirs["ms_per_step"] - copied) / ours["ms_per_step"]
        assert int(batch) == record["batch_size"]
        assert rate == f"{ours['images_per_second']:,.0f}"
        assert share == f"{ours['percent_of_matrix_rate']:.0f} %"
        assert found[5] == f"{faster:.2f}x ({without:.2f}x)"
        rates.append(ours["tflop_per_s"])
    assert [row.split("|")[2].strip() for row in table] == ["2962f72", "e05c118", "", "5a5b081"]
    (another,) = (
        report["ceilings"]["matrix_tflop_per_s"]["bf16"]
        for path in RESULTS.glob("tests-NVIDIA-H200-*.json")
        if (report := json.loads(path.read_text()))["commit"] == "2962f72"
    )
    share = f"{100 * rates[0] / another:.0f} %"
    text = " ".join(readme.split())
    assert f"by that of another process, two minutes earlier, the first row is at {share}" in text
