"""The pictures of docs/method.md: `python benchmarks/method_pictures.py RUN`.

RUN is a training with snapshots: `ict-fast train --out RUN --logging.snapshot-every 150`. One that is
finished without them gets none by a later command.
Written: noise.png, trajectories.png, levels.png, samples.png, loss.png, and figures.json with what the last
one shows. The trajectories need no run: their data are a mixture of two Gaussians, where everything is exact.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

matplotlib.use("agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import matplotlib.pyplot as plt  # noqa: E402
from closed_forms import PROBLEMS, Mixture, fixed_points  # noqa: E402
from small_png import save_small  # noqa: E402

from ict_fast import __version__  # noqa: E402
from ict_fast.checkpoint import checkpoint_steps, open_checkpoint  # noqa: E402
from ict_fast.config import Config, MethodConfig, from_dict  # noqa: E402
from ict_fast.consistency.curriculum import num_scales, stages  # noqa: E402
from ict_fast.consistency.model import ConsistencyModel, load_model  # noqa: E402
from ict_fast.consistency.objective import ConsistencyObjective  # noqa: E402
from ict_fast.consistency.sampling import sample  # noqa: E402
from ict_fast.data.pictures import to_uint8  # noqa: E402
from ict_fast.data.store import open_store  # noqa: E402
from ict_fast.errors import EXIT_BAD_INPUT, InputError  # noqa: E402
from ict_kernels import noise_level_grid, noise_level_probabilities, sample_noise_levels  # noqa: E402

Array = NDArray[np.float64]

SCALES = (11, 21, 41, 81, 161, 321, 641, 1281)
_SEED = 0


def noise(model: ConsistencyModel, images: torch.Tensor, labels: torch.Tensor | None, path: Path) -> None:
    """One image at eleven levels, what the trained model makes of each, and the levels of every stage."""
    grid = noise_level_grid(11).float()
    generator = torch.Generator().manual_seed(_SEED)
    z = torch.randn(images[:1].shape, generator=generator)
    noisy = images[:1] + grid.view(-1, 1, 1, 1) * z
    label = None if labels is None else labels[:1].expand(len(grid))
    clean = model(noisy, grid, label)

    figure = plt.figure(figsize=(10, 5.2), constrained_layout=True)
    rows = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    axes = rows[0].subplots(2, len(grid))
    for column, sigma in enumerate(grid.tolist()):
        for row, image in enumerate((noisy, clean)):
            axes[row][column].imshow(to_uint8(image)[column].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row][column].set(xticks=[], yticks=[])
        axes[0][column].set_title(f"{sigma:.3g}", fontsize=9)
    axes[0][0].set_ylabel("x + sigma z")
    axes[1][0].set_ylabel("f")
    axis = rows[1].subplots()
    for row, count in enumerate(SCALES):
        axis.plot(noise_level_grid(count), [row] * count, "|", ms=14, mew=0.6, color="tab:blue")
    axis.set_yticks(range(len(SCALES)), [f"N = {count}" for count in SCALES])
    axis.set(xscale="log", xlabel="sigma", title="the noise levels of each stage")
    axis.invert_yaxis()
    save_small(figure, path)
    plt.close(figure)


def trajectories(path: Path) -> None:
    """Exact trajectories, the walk that N = 11 levels average over, and the consistency function."""
    problem, method = PROBLEMS["mixture"], MethodConfig()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    sigma = np.geomspace(method.sigma_min, method.sigma_max, 120)

    def scaled(x: Array, level: Array | float) -> Array:
        return x / np.sqrt(method.sigma_data**2 + np.square(level))

    y = np.linspace(-2.6, 2.6, 260)
    density = np.stack([np.gradient(problem.cdf(y * math.hypot(s, method.sigma_data), s), y) for s in sigma])
    for axis in axes[:2]:
        axis.pcolormesh(sigma, y, density.T**0.6, cmap="Greys", shading="nearest", rasterized=True)
        axis.set(xscale="log", xlabel="sigma", xlim=(1.5e-3, 1e2), ylim=(-2.6, 2.6))
    axes[0].set_ylabel("x / sqrt(sigma_data² + sigma²)")
    shares = norm.cdf(np.linspace(-2.2, 2.2, 17))
    ways = np.stack([problem.quantile(shares, s) for s in sigma])
    for way in ways.T:
        axes[0].plot(sigma, scaled(way, sigma), color="tab:blue", lw=1)
    axes[0].set_title("trajectories of the probability-flow ODE")

    start = float(problem.quantile(np.array([0.5]), method.sigma_max)[0])
    grid, walks = random_walks(problem, start, 11, 40)
    axes[1].plot(grid, scaled(walks, grid).T, color="tab:orange", lw=0.6, alpha=0.7)
    exact = np.array([problem.quantile(np.array([0.5]), s)[0] for s in sigma])
    axes[1].plot(sigma, scaled(exact, sigma), color="tab:blue", lw=2, label="trajectory")
    (limit,) = fixed_points(problem, 11, [method.sigma_max])
    mean = scaled(limit(np.array([start])), method.sigma_min)
    axes[1].plot([method.sigma_min], mean, "o", color="tab:red", ms=9, label="mean end, what N = 11 learns")
    axes[1].legend(fontsize=8, loc="lower left")
    axes[1].set_title("with 11 levels: 40 walks from one start")

    place = np.linspace(-2.2, 2.2, 400)
    for level, colour in ((0.1, "black"), (0.5, "tab:orange"), (80.0, "tab:blue")):
        at = place * math.hypot(level, method.sigma_data)
        axes[2].plot(
            place, problem.exact(at, level, method.sigma_min), color=colour, label=f"f, sigma {level:g}"
        )
    at = place * math.hypot(80, method.sigma_data)
    axes[2].plot(place, problem.denoiser(at, 80.0), ":", color="tab:blue", label="denoiser, sigma 80")
    axes[2].plot(place, limit(at), "--", color="tab:red", label="what N = 11 learns, sigma 80")
    axes[2].legend(fontsize=8)
    axes[2].grid(alpha=0.3)
    axes[2].set(title="the consistency function", xlabel="x / sqrt(sigma_data² + sigma²)", ylabel="f")
    save_small(figure, path)
    plt.close(figure)


def random_walks(problem: Mixture, start: float, num_scales: int, count: int) -> tuple[Array, Array]:
    """Levels, descending, and (count, N) positions: draw x from the posterior, keep z, go one level down."""
    draw, grid = np.random.default_rng(_SEED), noise_level_grid(num_scales).numpy()[::-1]
    state = np.full(count, start)
    walks = [state]
    for sigma, lower in pairwise(grid):
        position, _, weight = problem.teacher_states(state, sigma, lower, 48)
        state = np.array([draw.choice(p, p=w) for p, w in zip(position, weight, strict=True)])
        walks.append(state)
    return grid, np.stack(walks, axis=1)


def levels(method: MethodConfig, path: Path) -> None:
    """How often each level is trained, and with which weight, by stage."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(SCALES)))
    for count, colour in zip(SCALES, colours, strict=True):
        grid = noise_level_grid(count).numpy()
        share = noise_level_probabilities(count, p_mean=method.p_mean, p_std=method.p_std).numpy()
        weight = 1 / np.diff(grid)
        label = f"N = {count}"
        axes[0].stairs(share / np.diff(np.log(grid)), grid, color=colour)
        axes[1].loglog(grid[:-1], weight, color=colour, label=label)
        axes[2].loglog(grid[:-1], share * weight / np.diff(np.log(grid)), color=colour, label=label)
    grid = noise_level_grid(1281).numpy()
    uniform = 1 / 1280 / np.diff(np.log(grid))
    axes[0].plot(grid[:-1], uniform, "k:", label="uniform index")
    axes[0].set(xscale="log", title="how often: density of ln sigma")
    axes[1].set_title("how much: weight 1 / (next sigma - sigma)")
    axes[2].set_title("both: their product")
    for axis in axes[:2]:
        axis.legend(fontsize=8)
    for axis in axes:
        axis.set_xlabel("sigma")
        axis.grid(alpha=0.3)
    save_small(figure, path)
    plt.close(figure)


def samples(run: Path, config: Config, path: Path) -> list[int]:
    """One-step samples of the same noise from every snapshot; returns the steps."""
    steps = sorted(checkpoint_steps(run))
    figure, axes = plt.subplots(
        len(steps), 10, figsize=(7, 0.72 * len(steps)), squeeze=False, constrained_layout=True
    )
    for row, step in enumerate(steps):
        pictures = to_uint8(sample(load_model(run / f"checkpoints/step-{step:08d}"), 10, seed=_SEED))
        for column in range(10):
            axes[row][column].imshow(pictures[column].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row][column].set(xticks=[], yticks=[])
        count = num_scales(max(step - 1, 0), config.training.total_steps, config.method)
        axes[row][0].set_ylabel(f"step {step}\nN = {count}", rotation=0, ha="right", va="center", fontsize=9)
    save_small(figure, path)
    plt.close(figure)
    return steps


@torch.no_grad()
def loss_by_level(
    model: ConsistencyModel, images: torch.Tensor, labels: torch.Tensor | None, count: int, batches: int
) -> list[dict[str, float]]:
    """Mean distance between student and teacher in ten buckets of equal width in ln sigma.

    Returns:
        Per bucket sigma (geometric middle), distance, loss (times the weight) and share (of the training).
    """
    config = model.config
    method = replace(config.method, indices="uniform")  # every level alike; the shares come in afterwards
    objective = ConsistencyObjective(model.network, method, c_noise=config.network.c_noise, scales=[count])
    draw = torch.Generator().manual_seed(_SEED)
    found: list[torch.Tensor] = []
    for step in range(batches):
        seed = torch.tensor([_SEED, step])
        pick = torch.randint(len(images), (256,), generator=draw)
        of = None if labels is None else labels[pick]
        loss = objective(images[pick], of, num_scales=count, seed=seed)
        drawn = sample_noise_levels(256, count, seed=seed, indices="uniform")
        found.append(
            torch.stack([drawn.index.double(), drawn.sigma.double(), loss.double() / drawn.weight, loss])
        )
    index, sigma, distance, weighted = torch.cat(found, dim=1)
    probability = noise_level_probabilities(count, p_mean=method.p_mean, p_std=method.p_std)
    edges = np.geomspace(method.sigma_min, method.sigma_max, 11)
    grid = noise_level_grid(count)
    buckets = []
    for low, high in pairwise(edges):
        inside = (sigma >= low * (1 - 1e-6)) & (sigma < high * (1 - 1e-6))
        of_bucket = (grid[:-1] >= low * (1 - 1e-6)) & (grid[:-1] < high * (1 - 1e-6))
        if not bool(inside.any()):
            continue
        share = probability[index[inside].long()]
        share = share / share.sum()  # within a bucket as the training draws them
        buckets.append(
            {
                "sigma": float(math.sqrt(low * high)),
                "distance": float((share * distance[inside]).sum()),
                "loss": float((share * weighted[inside]).sum()),
                "share": float(probability[of_bucket].sum()),
            }
        )
    return buckets


def loss(found: dict[int, list[dict[str, float]]], path: Path) -> None:
    """The buckets of the first and the last stage."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for count, buckets in found.items():
        sigma = [bucket["sigma"] for bucket in buckets]
        contribution = [bucket["share"] * bucket["loss"] for bucket in buckets]
        total = sum(contribution)
        axes[0].loglog(sigma, [bucket["distance"] for bucket in buckets], "o-", label=f"N = {count}")
        axes[1].loglog(sigma, [bucket["loss"] for bucket in buckets], "o-", label=f"N = {count}")
        axes[2].semilogx(sigma, [value / total for value in contribution], "o-", label=f"N = {count}")
    axes[0].set_title("distance between student and teacher")
    axes[1].set_title("times the weight: the loss")
    axes[2].set_title("times how often: share of the mean loss")
    axes[0].legend()
    for axis in axes:
        axis.set_xlabel("sigma")
        axis.grid(alpha=0.3)
    save_small(figure, path)
    plt.close(figure)


def draw_all(run: Path, out: Path, batches: int) -> None:
    """Every picture, and figures.json."""
    checkpoint = open_checkpoint(run)
    config = from_dict(checkpoint.state["config"])
    model = load_model(run)
    store = open_store(Path(config.data.path))
    images = torch.from_numpy(np.array(store.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(np.array(store.labels)).long() if config.network.num_classes else None
    out.mkdir(parents=True, exist_ok=True)
    noise(model, images, labels, out / "noise.png")
    trajectories(out / "trajectories.png")
    levels(config.method, out / "levels.png")
    steps = samples(run, config, out / "samples.png")
    plan = stages(config.training.total_steps, config.method)
    found = {
        count: loss_by_level(model, images, labels, count, batches)
        for count in sorted({plan[0].num_scales, plan[-1].num_scales})
    }
    loss(found, out / "loss.png")
    about: dict[str, Any] = {
        "command": "python benchmarks/method_pictures.py RUN",
        "versions": {"ict-fast": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "preset": config.preset,
        "seed": config.training.seed,
        "total_steps": config.training.total_steps,
        "snapshots": steps,
        "loss_by_level": {str(count): buckets for count, buckets in found.items()},
    }
    (out / "figures.json").write_text(json.dumps(about, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with snapshots")
    parser.add_argument("--batches", type=int, default=200, help="of 256 images, for the loss by level")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/method")
    options = parser.parse_args(argv)
    try:
        draw_all(options.run, options.out, options.batches)
    except InputError as error:
        print(f"method_pictures.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
