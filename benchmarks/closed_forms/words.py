"""The report of benchmarks/exactness.py as Markdown; every figure is the report's."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from statistics import mean

from closed_forms.report import (
    EXPECTED,
    TOLERANCE,
    Record,
    Report,
    at,
    curriculum_gains,
    holds,
    learned,
    limits,
    nearest,
    slopes,
    targets,
)

_FIGURES = {"rms": "root mean square", "mean": "mean"}
_LEARNED_AT = (0.5, 2.0, 80.0)  # the levels of the table of what is learned


def section(report: Report) -> str:
    """A page's section, without a heading."""
    return "\n\n".join(
        [
            _introduction(report),
            _limit_words(report),
            _limit_table(report),
            _learned_words(report),
            _learned_table(report),
            _target_words(report),
            _target_table(report),
            _huber_words(report),
            _huber_table(report),
        ]
    )


def _introduction(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return _paragraph(
        f"""
        Four distributions whose consistency function is known: a Gaussian, a mixture of two Gaussians (both
        on a line), two points, and a circle in the plane. Distances are in units of the data's standard
        deviation, over x + sigma z as it is distributed. By `{report["command"]}` ({report["date"][:10]};
        {versions}; {_seeds(report)}).
        """
    )


def _seeds(report: Report) -> str:
    seeds = list(map(str, report["seeds"]))
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"


def _limit_words(report: Report) -> str:
    verdicts = "; ".join(f"{name}: {_verdict(report, name)}" for name in EXPECTED)
    count = limits(report, "gaussian", "l2")[-1]["num_scales"]
    constant = (1 - report["gaussian"]["closed_form"][-1]) * (count - 1)
    return _paragraph(
        f"""
        **What N levels can learn.** At the optimum of the squared norm the student is the conditional mean
        of its target, f_(i+1)(y) = E[f_i(x + s_i z) | x + s_(i+1) z = y], f_1(y) = y: a recursion that
        needs no training and is computed here in float64. For Gaussian data of variance v it is closed: f_N
        is linear, and its slope over the exact one is the product of cos(b_(i+1) - b_i), with tan b_i = s_i
        / sqrt(v). So the relative error is C/(N - 1) to first order, with C =
        {report["gaussian"]["leading_constant"]:.4f} by an integral and {constant:.4f} at N = {count}. That
        is the order that theorem 1 of [Song et al. 2023](https://arxiv.org/abs/2303.01469) has for an Euler
        step and a Lipschitz consistency function. Two points have none: between them the exact function
        jumps. The noise of the targets adds up to a variance of O(1/N) and smears the jump over a width of
        O(N^-1/2): a mean error of O(N^-1/2), a root mean square of O(N^-1/4). A circle has one such place,
        its centre, with a share of the probability that falls as the square of that width: a root mean
        square of O(N^-1/2). Powers found between the two largest N, within {TOLERANCE:g} of these:
        {verdicts}. A mixture's function is smooth but steep between its modes; first order is reached when
        the walks spread less than that.
        """
    )


def _verdict(report: Report, name: str) -> str:
    if holds(report, name):
        return "holds"
    found = slopes(report, name, "rms")
    return (
        f"**does not hold at these N**, the power of the root mean square goes from {found[0]:.2f} between"
        f" the two smallest N over {found[len(found) // 2]:.2f} to {found[-1]:.2f}"
    )


def _limit_table(report: Report) -> str:
    counts = [record["num_scales"] for record in limits(report, "gaussian", "l2")]
    rows = []
    for name, expected in EXPECTED.items():
        records = limits(report, name, "l2")
        for figure, power in expected.items():
            values = [f"{record['levels'][-1][figure]:.4f}" for record in records]
            theory = "" if power is None else f"{power:g}"
            rows.append(
                [f"{name}, {_FIGURES[figure]}", *values, f"{slopes(report, name, figure)[-1]:.2f}", theory]
            )
    counted = [f"N = {count}" for count in counts]
    return _table(["fixed point - exact, sigma = 80", *counted, "power", "expected"], rows)


def _learned_words(report: Report) -> str:
    records = learned(report, "l2", "doubling")
    middle = [nearest(record, 2.0) for record in records]
    top = [record["levels"][-1] for record in records]
    squared, huber = (
        mean(r["levels"][-1]["to_fixed_point"] for r in learned(report, metric, "doubling", "gaussian"))
        for metric in ("l2", "pseudo-huber")
    )
    training = report["training"]
    return _paragraph(
        f"""
        **What is learned.** A multilayer perceptron, trained by the project's objective and RAdam for
        {training["steps"]:,} steps of {training["batch_size"]}, with the doubling curriculum to N =
        {records[0]["num_scales"]} and with fixed N. It arrives at the fixed point of its N rather than at the
        exact function: at sigma = {middle[0]["sigma"]:.2f}, with the squared norm and the curriculum, it is
        {_range(level["to_fixed_point"] for level in middle)} from the former and
        {_range(level["to_exact"] for level in middle)} from the latter. At sigma = {top[0]["sigma"]:g} it is
        less exact, {_range(level["to_fixed_point"] for level in top)} from the fixed point. The largest
        levels are seldom drawn, and each passes on what the level below has not learned yet; how much of it
        that is was not separated, and with the same draws Pseudo-Huber ends {huber:.3f} from its fixed point
        for the Gaussian, the squared norm {squared:.3f}. {_curriculum_words(report)} The denoiser E[x | x +
        sigma z], which a diffusion model learns, is another function,
        {_range(level["to_denoiser"] for level in middle)} away.
        """
    )


def _curriculum_words(report: Report) -> str:
    gains = {sigma: curriculum_gains(report, sigma) for sigma in _LEARNED_AT}
    every = [gain for some in gains.values() for gain in some]
    if not every:
        return ""
    counts = ", ".join(
        f"{sum(gain > 0 for gain in some)} of {len(some)} at sigma {sigma:g}" for sigma, some in gains.items()
    )
    verdict = (
        "here the doubling curriculum helps"
        if sum(gain > 0 for gain in every) > len(every) / 2
        else "**in these problems the doubling curriculum brings nothing**, whatever it does for images"
    )
    return f"""
        Against the same N from the first step on it ends nearer to the exact function with the curriculum in
        so many problems: {counts}; {verdict}.
        """


def _learned_table(report: Report) -> str:
    groups: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in report["learned"]:
        key = (record["problem"], record["metric"], record["curriculum"], record["num_scales"])
        groups.setdefault(key, []).append(record)
    rows = []
    for (problem, metric, curriculum, count), records in groups.items():
        cells = [problem, metric, f"{curriculum}, N = {count}"]
        for sigma in _LEARNED_AT:
            levels = [nearest(record, sigma) for record in records]
            cells += [_spread([x[which] for x in levels]) for which in ("to_exact", "to_fixed_point")]
        rows.append(cells)
    head = [f"sigma {sigma:g}: to {which}" for sigma in _LEARNED_AT for which in ("exact", "fixed point")]
    return _table(["data", "metric", "curriculum", *head], rows)


def _target_words(report: Report) -> str:
    first, last = (targets(report, "mixture")[i] for i in (0, -1))
    bias, std = (at(last, 0.8)[figure] / at(first, 0.8)[figure] for figure in ("bias", "std"))
    return _paragraph(
        f"""
        **The target's bias and noise.** Given x + s_(i+1) z = y, the target f(x + s_i z, s_i), f the exact
        function, has a mean that differs from f(y, s_(i+1)) by O(1/N^2), the error of an Euler step and of
        the function's curvature, and a standard deviation of O(1/N), the step times that of z given y. Along
        the grid the N biases add up to O(1/N). For the mixture at sigma near 0.8 the bias at N =
        {last["num_scales"]} is {bias:.1e} of that at N = {first["num_scales"]}, the standard deviation
        {std:.1e} of it: a finer grid has less bias and, relative to it, more noise. That is the paper's
        argument for a curriculum that begins coarse; what one brought in these trainings stands above. For
        the two points both are that of the few positions from which the jump can be reached, a share of
        O(1/N): O(N^-1/2). To the circle's centre it is O(1/N^2), and the bias O(1/N).
        """
    )


def _target_table(report: Report) -> str:
    counts = [f"N = {record['num_scales']}" for record in targets(report, "gaussian")]
    rows = [
        [f"{name}, {words}", *(f"{at(record, 0.8)[figure]:.1e}" for record in targets(report, name))]
        for name in EXPECTED
        for figure, words in (("bias", "bias"), ("std", "standard deviation"))
    ]
    return _table(["target at sigma near 0.8", *counts], rows)


def _huber_words(report: Report) -> str:
    one, many = report["dimensions"][0], report["dimensions"][-1]
    huber = limits(report, "mixture", "pseudo-huber")[-1]
    (squared,) = (r for r in limits(report, "mixture", "l2") if r["num_scales"] == huber["num_scales"])
    trained = [record["levels"][-1] for record in learned(report, "pseudo-huber", "doubling", "mixture")]
    points, ring = (_at_the_top(report, name, huber["num_scales"]) for name in ("two points", "ring"))
    offsets = [record["offset"] for record in report["dimensions"]]
    factors = [f"{before / after:.1f}" for before, after in pairwise(offsets)]
    return _paragraph(
        f"""
        **What does not hold: Pseudo-Huber, in one dimension and with skewed noise, does not converge to the
        consistency function at these N.** While the target's noise is larger than c = 0.00054 sqrt(d), the
        metric finds the target's median, not its mean, and where the noise is skewed that is another point at
        every step. Symmetry hides it (the Gaussian); where the exact function jumps it even helps, since a
        median snaps to what is likelier: at sigma = 80 and N = {huber["num_scales"]} the fixed point of two
        points is {points["pseudo-huber"]:.3f} from it, that of the circle {ring["pseudo-huber"]:.3f}, with
        the squared norm {points["l2"]:.3f} and {ring["l2"]:.3f}. For the mixture the fixed point at N =
        {huber["num_scales"]} stays {huber["levels"][-1]["rms"]:.3f} from the exact function at sigma = 80,
        against {squared["levels"][-1]["rms"]:.3f} with the squared norm, and the trained networks end
        {_range(level["to_exact"] for level in trained)} from it. It is the dimension that does it: over a
        whole image of d independent values the distance to the target is nearly the same for all targets, and
        the offset of the metric's centre from the mean falls as 1/d once d is large: from {one["offset"]:.3f}
        of the target's standard deviation for one value, by factors of {", ".join(factors)} from column to
        column of the table, to {many["offset"]:.4f} for {many["values"]}. The values of real images are not
        independent, so theirs lies in between.
        """
    )


def _at_the_top(report: Report, problem: str, count: int) -> dict[str, float]:
    """By metric: distance of the fixed point at N from the exact function, at sigma_max."""
    return {
        record["metric"]: record["levels"][-1]["rms"]
        for record in report["fixed_points"]
        if (record["problem"], record["num_scales"]) == (problem, count)
    }


def _huber_table(report: Report) -> str:
    records = report["dimensions"]
    head = ["Pseudo-Huber centre - mean of the target", *(f"d = {record['values']}" for record in records)]
    offsets = [f"{record['offset']:.4f}" for record in records]
    return _table(head, [["in standard deviations of the target", *offsets]])


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    if len(ordered) == 1:
        return f"{ordered[0]:.3f}"
    return f"{ordered[0]:.3f} to {ordered[-1]:.3f}"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
