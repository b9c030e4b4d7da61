"""The ablation's part of docs/EVIDENCE.md: every figure and every "holds" from the report alone."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from page import table

from ict_fast import presets
from ict_fast.ablation.summary import VERDICT_HEADER, commands, distance, rows, verdict_rows
from ict_fast.ablation.variants import configured, teacher_reach, variants_of
from ict_fast.ablation.verdicts import Summary, Verdict, chance, judge, summarise
from ict_fast.config import Config, from_dict
from ict_fast.consistency import num_scales
from ict_fast.training.monitor import duration

__all__ = ["commands", "section"]

_PAPER = "cifar10"  # the preset whose learning rate and length are the paper's


def section(report: dict[str, Any]) -> str:
    """The claims, the variants, and how to read them, in Markdown."""
    verdicts = judge(report)
    parts = [_what_was_run(report), _RULE]
    for required, title in ((True, "The orderings asked of an implementation"), (False, "All others")):
        body = verdict_rows(report, required=required)
        if body:
            chosen = [verdict for verdict in verdicts if verdict.finding.required == required]
            parts += [f"**{title}.** {_count(chosen)}", _flush(VERDICT_HEADER, body, 2, 3)]
    parts += [
        *_by_chance(verdicts),
        "![One-step distance of every variant](../benchmarks/results/ablation.png)",
        "Fréchet distance in the features of the evaluation, in % of that of uniform noise, mean ± standard "
        "error of the seeds:",
        _flush(("", "variant", "seeds", "one step", "two steps"), _without_repeats(rows(report)), 2, 5),
        *_reading(report),
    ]
    return "\n\n".join(_wrapped(part) for part in parts) + "\n"


_RULE = """
An ordering holds if the bars of one standard error do not meet, with the claimed factor where there is one.
The ratio is that of the mean one-step distances, the worse over the better, with its standard error to
first order, all seeds taken as independent. A variant farther from the data than noise has not trained, and
two of those are not compared. One all of whose seeds diverge is the worse one; one some of whose seeds
diverge is never the better one.
"""


def _what_was_run(report: dict[str, Any]) -> str:
    base = report["base"]
    steps, batch = base["training"]["total_steps"], base["training"]["batch_size"]
    said = [f"Preset `{base['preset']}`, {steps:,} steps of {batch:,} images, {_seeds(report)}"]
    if "count" in report:
        said.append(f", {report['count']:,} samples for each figure")
    seconds = sum(run["seconds"] for variant in report["variants"] for run in variant["runs"])
    threads = f" with {_plural(report['threads'], 'thread')} each" if "threads" in report else ""
    said += [
        f". Gathered on {report['date']} (UTC); {report['device']} ({report['machine']}), ",
        f"{_plural(report['parallel'], 'run')} at once{threads}, {duration(seconds)} of run time in all",
    ]
    if "versions" in report:
        said.append("; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    return "".join(said) + "."


def _seeds(report: dict[str, Any]) -> str:
    """How many seeds of how many variants."""
    counts = Counter(summary.seeds for summary in summarise(report).values())
    if len(counts) == 1:
        return f"{_plural(*counts, 'seed')} of each of {_plural(counts.total(), 'variant')}"
    each = [
        f"{_plural(seeds, 'seed')} of {_plural(number, 'variant')}"
        for seeds, number in sorted(counts.items())
    ]
    return _listed(each) if each else "no seeds yet"


def _count(verdicts: Sequence[Verdict]) -> str:
    kinds = Counter(verdict.kind for verdict in verdicts)
    return (
        f"Of these {len(verdicts)}, in one step: {kinds['holds']} hold, {kinds['open']} open, "
        f"{kinds['reversed']} the other way round."
    )


def _by_chance(verdicts: Sequence[Verdict]) -> list[str]:
    """How much of this nothing at all would have given."""
    pairs = [tuple(sorted((v.better.count, v.worse.count))) for v in verdicts if v.outcome != "neither"]
    pairs = [pair for pair in pairs if pair[0] >= 2]
    if not pairs:
        return []
    rates = [
        f"{100 * chance(first, second):.1f} % of cases with {first} "
        + ("seeds each" if first == second else f"and {second} seeds")
        for first, second in sorted(set(pairs))
    ]
    expected = sum(chance(*pair) for pair in pairs)
    shared = sum("ict" in (v.finding.better, v.finding.worse) for v in verdicts)
    return [
        "**By chance.** Were there nothing between two variants, their ordering would be said to hold in "
        f"{_listed(rates)}, and as often to be the other way round (simulated, normal distances). Over the "
        f"{len(pairs)} comparisons with two seeds or more on both sides that is up to {expected:.1f} of "
        f"each. {shared} of all {len(verdicts)} comparisons have iCT on one side and share its mean: they "
        f"are not independent, and were its seeds lucky ones, all of them would look better than they are."
    ]


def _reading(report: dict[str, Any]) -> list[str]:
    """What a reader has to know before believing a row; written from the report, whatever it says."""
    base, found = from_dict(report["base"]), summarise(report)
    return [
        "How to read it.",
        *_lag(base, found),
        *_rate(base, found),
        *_ladder(base, found),
        *_factor(base, found),
        *_halves(report),
        *_dropout(base, report),
    ]


def _lag(base: Config, found: dict[str, Summary]) -> list[str]:
    steps, paper = base.training.total_steps, presets.get(_PAPER)
    methods = {v.name: configured(base, v).method for v in variants_of(base)}
    reach = {
        name: teacher_reach(method, num_scales(steps, steps, method)) for name, method in methods.items()
    }
    ours, theirs = base.optimizer.lr, paper.optimizer.lr
    long, longest = paper.training.total_steps, reach["ema-teacher"]
    said = [
        "**The EMA teacher's lag.** It averages the student over the last N / (s0 ln(1/mu0)) steps: at the "
        f"end {reach['ct2023']:,.0f} in the baseline and {longest:,.0f} in iCT with that teacher. That is "
        f"{_share(reach['ct2023'], steps)} and {_share(longest, steps)} of a run of {steps:,} steps here, "
        f"and at most {_share(longest, long)} of the paper's {long:,}."
    ]
    if ours > theirs:
        said.append(
            f"The student also moves faster: its learning rate, {ours:g}, is {ours / theirs:.3g} times the "
            f"paper's {theirs:g}, and a teacher that is as many steps behind is that much farther away."
        )
    said.append(
        "So a row with an EMA teacher measures how harmful this lag is in a short and fast run; how harmful "
        "it is in a long and slow one it cannot say."
    )
    ends = [
        f"{_percent(found[name])} with one that reaches back {reach[name]:,.0f} steps"
        for name in ("ema-teacher", *(v.name for v in variants_of(base) if v.group == "teacher"))
        if name in found
    ]
    if ends and "ict" in found:
        said.append(f"iCT ends at {_percent(found['ict'])} without an EMA teacher, at {_listed(ends)}.")
    said.append("As mu0 goes to 0 it is the student's own teacher again, loss for loss, which a test shows.")
    return [" ".join(said)]


def _rate(base: Config, found: dict[str, Summary]) -> list[str]:
    control = [v for v in variants_of(base) if v.group == "learning-rate"]
    all_run = "all but the control run" if control else "all run"
    said = (
        f"**The learning rate.** No variant is retuned: {all_run} at {base.optimizer.lr:g}, constant, which "
        "was chosen for iCT, and another variant may have done better at another rate."
    )
    if not control:
        return [said]
    said += (
        " The control repeats iCT and its fastest-following EMA teacher at a lower rate, to tell what an EMA "
        "does from what an EMA does at a high rate"
    )
    measured = [f"{v.label}: {_percent(found[v.name])}" for v in control if v.name in found]
    return [f"{said}: {'; '.join(measured)}." if measured else f"{said}. It was not run."]


def _ladder(base: Config, found: dict[str, Summary]) -> list[str]:
    rungs = [v for v in variants_of(base) if v.group == "ladder" and v.name in found]
    if not rungs:
        return []
    said = (
        "**The ladder** is one order of many: a rung says what its ingredient does after those above it, and "
        "the rungs stand as they came out, those that change nothing or make it worse too. Its last rung is "
        "iCT but for the noise levels: uniform indices, weight 1."
    )
    untrained = [v.label for v in rungs if not found[v.name].trains]
    if untrained:
        said += (
            f" Not trained at all, as far from the data as noise or farther: {_listed(untrained)}. Nothing "
            "can be read off the order of such rungs, and a ratio to one says only that it does not train "
            "in so few steps."
        )
    return [said]


def _factor(base: Config, found: dict[str, Summary]) -> list[str]:
    if not {"ict", "ct2023"} <= found.keys():
        return []
    said = (
        "**The factor.** The paper's abstract has iCT 3.5 times (CIFAR-10) and 4 times (ImageNet 64x64) "
        "better in one step than consistency training of 2023, whose results are with LPIPS. The factor 2 "
        "over a baseline with L2 is what is asked here."
    )
    if not found["ct2023"].trains:
        said += (
            f" That baseline does not train in {base.training.total_steps:,} steps"
            f" ({_percent(found['ct2023'])}), which makes any factor easy; the row to look at is the one"
            " against the baseline without an EMA in its teacher"
        )
        said += f" ({_percent(found['ct2023-no-ema'])})." if "ct2023-no-ema" in found else "."
    return [said]


def _halves(report: dict[str, Any]) -> list[str]:
    if "reference" not in report:
        return []
    reference = report["reference"]
    total, share = reference["count"], reference["halves"] / reference["noise"]
    return [
        f"**Real images.** {total // 2:,} of the real images are at {100 * share:.2f} % from the other "
        f"{total - total // 2:,}. A variant's figure is of {report['count']:,} samples against all "
        f"{total:,}; a Fréchet distance between fewer images is larger, so a variant below "
        "that line is not better than real."
    ]


def _dropout(base: Config, report: dict[str, Any]) -> list[str]:
    if "reference" not in report or not any(v["group"] == "dropout" for v in report["variants"]):
        return []
    seen = base.training.total_steps * base.training.batch_size / report["reference"]["count"]
    paper = presets.get(_PAPER).training
    epochs = paper.total_steps * paper.batch_size / 50_000
    return [
        "**Dropout** is a remedy for a network that is large for its data and sees them often: here every "
        f"image is seen {seen:,.0f} times, in the paper's CIFAR-10 run {epochs:,.0f} times."
    ]


def _percent(summary: Summary) -> str:
    """In running text: 1.14 ± 0.05 % of noise."""
    return f"{distance(summary)} % of noise" if summary.count else "no distance, all seeds diverged"


def _share(steps: float, total: int) -> str:
    return f"{100 * steps / total:.2g} %" if steps < 0.995 * total else f"{100 * steps / total:.0f} %"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""


def _without_repeats(body: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A group's name in its first row alone."""
    shown, last = [], None
    for row in body:
        shown.append(("" if row[0] == last else row[0], *row[1:]))
        last = row[0]
    return shown


def _flush(header: Sequence[str], body: Iterable[Sequence[str]], first: int, end: int) -> str:
    """A Markdown table whose columns from `first` to before `end` are flushed right."""
    lines = table(header, list(body)).splitlines()
    rule = ["---:" if first <= number < end else "---" for number in range(len(header))]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[2:]])


def _wrapped(part: str) -> str:
    if part.startswith(("|", "!")):
        return part
    return textwrap.fill(" ".join(part.split()), 110, break_long_words=False, break_on_hyphens=False)
