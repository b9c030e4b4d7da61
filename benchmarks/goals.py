"""What the measurements are held against, and whether they reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from floor_figures import times_the_floor
from gpu_baselines import WITHOUT_REDUCTIONS
from gpu_optimizer import RADAM
from gpu_timing import COPIES, OURS
from results_index import Entry, Results


@dataclass(frozen=True)
class Reached:
    """A goal's figure on a machine.

    Attributes:
        where: the machine.
        value: the worst of what was measured.
        file: that the value is from.
        worst: what had this value.
        measured, offered: of how many cases it is the worst, and of how many it would have to be.
        failed: variants that could not run in them, which the figure says nothing of.
    """

    where: str
    value: float
    file: str
    worst: str = ""
    measured: int = 1
    offered: int = 1
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """A bound on a figure.

    Attributes:
        key: of its section in results/analysis.md, where a miss is analysed.
        text: what is bounded.
        limit, unit: at least this, or at most if `at_most`.
        figures: what the results say; nothing where it was not measured.
    """

    key: str
    text: str
    limit: float
    unit: str
    figures: Callable[[Results], Iterator[Reached]]
    at_most: bool = False

    def is_met(self, reached: Reached) -> bool:
        return reached.value <= self.limit if self.at_most else reached.value >= self.limit

    def verdict(self, reached: Reached) -> str:
        """Whether it is met; a case that was not measured, or a baseline that failed, leaves that open."""
        if not self.is_met(reached):
            return "**no**"
        if reached.measured == reached.offered and not reached.failed:
            return "yes"
        part = f"in part: {reached.measured:,} of {reached.offered:,}"
        return f"{part}; failed: {', '.join(reached.failed)}" if reached.failed else part

    @property
    def bound(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}{self.unit}"


Case = tuple[str, str, Entry]


def _cases(results: Results, op: str, dropout: bool | None = None) -> Iterator[Case]:
    """(GPU, name, entry) of the kernels' cases of an op, those that were not measured too."""
    for gpu, name, entry in results.of_part("kernels"):
        if name.startswith(op) and (dropout is None or ("dropout" in name) == dropout):
            yield gpu, name, entry


def _worst(cases: Iterable[Case], value: Callable[[dict[str, Any]], float | None]) -> Iterator[Reached]:
    """The smallest value of all stages of all cases, on each GPU."""
    by_gpu: dict[str, list[tuple[str, Entry]]] = {}
    for gpu, name, entry in cases:
        by_gpu.setdefault(gpu, []).append((name, entry))
    for gpu, offered in by_gpu.items():
        found: list[tuple[float, str, str]] = []
        measured = 0
        for name, entry in offered:
            stages = entry.record.get("stages", {})
            values = {stage: value(figures) for stage, figures in stages.items()}
            measured += bool(values) and None not in values.values() and entry.rank == 2
            found += [
                (each, f"{name}, {stage}", entry.file) for stage, each in values.items() if each is not None
            ]
        if found:
            smallest, worst, file = min(found)
            failed = {variant for _, entry in offered for variant in entry.record.get("failed", {})}
            yield Reached(gpu, smallest, file, worst, measured, len(offered), tuple(sorted(failed)))


def _against_best(figures: dict[str, Any]) -> float | None:
    others = [ms for name, ms in figures["ms"].items() if name not in (OURS, *COPIES)]
    return min(others) / figures["ms"][OURS] if others else None


def _against(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda figures: figures["times_faster_than"].get(name)


def _against_radam(figures: dict[str, Any]) -> float | None:
    """The smaller of two ratios: in a CUDA graph, where torch's RAdam must be capturable, and queued."""
    queued = figures.get("queued_ms", {})
    ours, theirs = queued.get(OURS), queued.get(RADAM)
    in_graph: float = figures["times_faster_than"][RADAM]
    return min(in_graph, theirs / ours) if ours and theirs else None


def _adm_step(
    value: Callable[[dict[str, Any]], float | None], *, of_earlier: bool = False
) -> Callable[[Results], Iterator[Reached]]:
    """
    Args:
        of_earlier: where the newest run did not get to it, the newest that did counts; its commit is said.
    """

    def figures(results: Results) -> Iterator[Reached]:
        for gpu, name, newest in results.of_part("step"):
            entry = newest if name == "step, imagenet64" else None
            while entry is not None:
                found = value(entry.record) if "variants" in entry.record else None
                if found is not None:
                    yield Reached(gpu if entry is newest else f"{gpu}; {entry.of}", found, entry.file)
                    break
                entry = entry.before if of_earlier else None

    return figures


def _failed_tests(results: Results) -> Iterator[Reached]:
    """Over all files of tests and the sanitizer's tools; a name that was not got to counts as one test.

    Of which commits they are is said: kernels may have changed since some of them.
    """
    by_gpu: dict[str, list[Entry]] = {}
    for gpu, _, entry in results.of_part("tests"):
        by_gpu.setdefault(gpu, []).append(entry)
    for gpu, entries in by_gpu.items():
        wrong = ran = late = 0
        file = entries[-1].file
        for entry in entries:
            counts = entry.record.get("counts", {})
            bad = counts.get("failed", 0) + counts.get("error", 0)
            file = entry.file if bad else file
            wrong, ran = wrong + bad, ran + bad + counts.get("passed", 0)
            late += counts.get("not run", 0) if counts else 1
        if ran:
            yield Reached(gpu, wrong, file, _commits(entries), ran, ran + late)


def _commits(entries: Iterable[Entry]) -> str:
    """Those that ran tests, those of older kernels by themselves."""
    ran = [entry for entry in entries if entry.record.get("counts")]
    said = []
    for kernels, older in (("commit", False), ("older kernels", True)):
        commits = {str(entry.commit): None for entry in ran if entry.older_kernels is older}
        said += [f"{kernels}: {', '.join(commits)}"] if commits else []
    return "; ".join(said)


def _learnt(results: Results) -> Iterator[Reached]:
    demo = results.read("digits-demo.json")
    for gpu, _, entry in results.of_part("train"):
        if demo is not None and "one_step" in entry.record:
            distance = entry.record["one_step"]["frechet_distance"]
            yield Reached(gpu, distance / demo.record["reference"]["gaussian"], entry.file)


def suite_ms(results: Results, op: str, variant: str) -> float | None:
    """The suite's milliseconds of an op by a variant."""
    for record in results.suite_records():
        if record.get("op") == op and record.get("variant") == variant:
            return float(record["ms"])
    return None


def _suite(value: Callable[[Results], float | None]) -> Callable[[Results], Iterator[Reached]]:
    def figures(results: Results) -> Iterator[Reached]:
        found = value(results)
        if found is not None and results.suite is not None:
            yield Reached("CPU", found, results.suite.file)

    return figures


def _rate(variant: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        for record in results.suite_records("loaders"):
            if record.get("variant") == variant:
                return float(record["images_per_second"]) / 1000
        return None

    return value


def _stall(results: Results) -> float | None:
    stall = suite_ms(results, "checkpoint, digits", "the training waits")
    step = suite_ms(results, "training step, digits", "ict-fast, uncompiled")
    return None if stall is None or step is None else 100 * stall / (300 * step)


def _warm_start(results: Results) -> float | None:
    op = "process to the end of the first step, digits, cpu"
    cold, warm = (suite_ms(results, op, state) for state in ("cold", "warm"))
    return None if cold is None or warm is None else cold / warm


def _overhead(processes: int) -> Callable[[Results], float | None]:
    def percent(results: Results) -> float | None:
        for record in results.suite_records("trainer"):
            if record["processes"] == processes:
                return 100 * float(record["overhead"])
        return None

    return percent


def _of_ours(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record["variants"].get("ict-fast", {}).get(key)


def _step_against(name: str) -> Callable[[dict[str, Any]], float | None]:
    """Inductor's name depends on torch's version, see gpu_baselines.py."""

    def value(record: dict[str, Any]) -> float | None:
        ratios = record.get("times_faster_than", {})
        return ratios.get(name, ratios.get(name + WITHOUT_REDUCTIONS))

    return value


def _copy(figures: dict[str, Any]) -> float:
    return float(figures["percent_of_copy"])


NORM = "group_norm_silu"
GOALS = (
    Goal("gpu-tests", "tests/gpu that fail", 0, "", _failed_tests, at_most=True),
    Goal(
        "norm-baseline",
        "group_norm_silu, both directions, every shape: the fastest baseline's time over ours",
        1,
        "x",
        lambda results: _worst(_cases(results, NORM), _against_best),
    ),
    Goal(
        "norm-copy",
        "group_norm_silu without dropout, every shape: rate of a copy of its bytes",
        85,
        " %",
        lambda results: _worst(_cases(results, NORM, dropout=False), _copy),
    ),
    Goal(
        "norm-dropout-copy",
        "group_norm_silu with dropout, every shape: rate of a copy of its bytes",
        70,
        " %",
        lambda results: _worst(_cases(results, NORM, dropout=True), _copy),
    ),
    Goal(
        "loss-eager",
        "consistency_loss, both directions: faster than eager",
        5,
        "x",
        lambda results: _worst(_cases(results, "consistency_loss"), _against("eager")),
    ),
    Goal(
        "optimizer-copy",
        "RAdamEMA: rate of a copy of 38 bytes per parameter",
        85,
        " %",
        lambda results: _worst(results.of_part("optimizer"), _copy),
    ),
    Goal(
        "optimizer-foreach",
        "RAdamEMA: faster than torch's foreach RAdam with a foreach average, in a CUDA graph and queued",
        3,
        "x",
        lambda results: _worst(results.of_part("optimizer"), _against_radam),
    ),
    Goal(
        "step-floor",
        "ADM-64 step over its convolutions and attention alone",
        1.25,
        "x",
        _adm_step(times_the_floor),
        at_most=True,
    ),
    Goal(
        "step-matrix-rate",
        "ADM-64 step: share of the measured bf16 matrix rate",
        45,
        " %",
        _adm_step(_of_ours("percent_of_matrix_rate")),
    ),
    Goal(
        "step-inductor",
        "ADM-64 step: faster than Inductor (its defaults)",
        1.12,
        "x",
        _adm_step(_step_against("inductor"), of_earlier=True),
    ),
    Goal(
        "step-tuned",
        "ADM-64 step: faster than Inductor (raised thresholds)",
        1.05,
        "x",
        _adm_step(_step_against("inductor, raised thresholds"), of_earlier=True),
    ),
    Goal(
        "train-learns",
        "the GPU's run: one-step distance, relative to a Gaussian fitted to the pixels",
        1,
        "x",
        _learnt,
        at_most=True,
    ),
    Goal(
        "loader-memmap", "memmap loader, 64x64, two cores", 500, " thousand images/s", _suite(_rate("memmap"))
    ),
    Goal("loader-dali", "DALI loader, 64x64, two cores", 150, " thousand images/s", _suite(_rate("dali"))),
    Goal(
        "loop-overhead",
        "the loop's cost beside a step of 100 ms",
        2,
        " %",
        _suite(_overhead(1)),
        at_most=True,
    ),
    Goal(
        "loop-overhead-of-two",
        "the same in two processes, but for gloo's reduction of the gradients",
        2,
        " %",
        _suite(_overhead(2)),
        at_most=True,
    ),
    Goal(
        "checkpoint-stall",
        "digits: wait for checkpoints, of the run's time",
        1,
        " %",
        _suite(_stall),
        at_most=True,
    ),
    Goal("warm-start", "compiled start, digits: cold over warm", 3, "x", _suite(_warm_start)),
)
