"""What a trunk in less than fp32 does to the gradient, by stage: `python benchmarks/precision.py RUN`.

For each stage N = 11, 21, ..., 1281 of a trained run's curriculum, the gradient of the same batches, with the
same noise, in fp32 and with the trunk in bf16, fp16 and TF32. A CPU has no TF32: there its rounding is
emulated (ict_fast/networks/tf32.py). Written: precision.json, precision.md, precision.png:

* cosine: of one batch's gradient with its fp32 gradient, mean over the batches;
* cosine of the mean: the same of the mean gradient over all batches, in which what is noise averages out;
* norm: of the mean gradient, relative to fp32;
* noise: variance that the rounding adds, relative to the variance of the fp32 gradient over the batches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ict_fast.config import Config, from_dict  # noqa: E402
from ict_fast.consistency.curriculum import stages  # noqa: E402
from ict_fast.data.loaders import Batch, make_loader  # noqa: E402
from ict_fast.data.store import open_store  # noqa: E402
from ict_fast.training.launch import configure_torch  # noqa: E402
from ict_fast.training.step import TrainStep  # noqa: E402

PRECISIONS = ("fp32", "bf16", "fp16", "tf32")


def measure(config: Config, steps: dict[str, TrainStep], num_scales: int, batches: Sequence[Batch]) -> dict:
    """The figures of one stage.

    Args:
        config: of the run.
        steps: by precision, with the same weights; "fp32" is the reference.
        num_scales: N of the stage.
        batches: whole batches; the k-th gets the noise of step k.
    Returns:
        By precision: cosine, cosine_of_mean, norm and noise, as above.
    """
    gradients = {
        name: torch.stack([gradient(step, num_scales, k, batch) for k, batch in enumerate(batches)])
        for name, step in steps.items()
    }
    exact = gradients.pop("fp32")
    sampling = exact.var(dim=0).sum()
    found = {}
    for name, rounded in gradients.items():
        cosine = torch.nn.functional.cosine_similarity(rounded, exact, dim=1)
        means = rounded.mean(dim=0), exact.mean(dim=0)
        found[name] = {
            "cosine": float(cosine.mean()),
            "cosine_of_mean": float(torch.nn.functional.cosine_similarity(*means, dim=0)),
            "norm": float(means[0].norm() / means[1].norm()),
            "noise": float((rounded - exact).var(dim=0).sum() / sampling),
        }
    return found


def gradient(step: TrainStep, num_scales: int, number: int, batch: Batch) -> Tensor:
    """The flat fp64 gradient of one batch at one stage, with the noise and levels of step `number`."""
    step.num_scales.fill_(num_scales)
    step.seed_and_step[1].fill_(number)
    while True:
        step.gradient([batch])
        grads = [p.grad for p in step.network.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten().double() for grad in grads])
        if step.loss_scale is None:
            return flat
        if bool(flat.isfinite().all()):
            return flat / step.loss_scale.value.double()
        step.loss_scale.advance(torch.tensor(True, device=flat.device))  # as a run would, skipping a step


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table, a row per stage."""
    names = list(report["stages"][0]["precisions"])
    figures = ("cosine", "cosine_of_mean", "norm", "noise")
    rows = [["N", *(f"{name}: {figure.replace('_', ' ')}" for name in names for figure in figures)]]
    rows.append(["---"] * len(rows[0]))
    for stage in report["stages"]:
        values = [stage["precisions"][name][figure] for name in names for figure in figures]
        rows.append([str(stage["num_scales"]), *(f"{value:.4f}" for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """1 - cosine and the added noise over N, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    scales = [stage["num_scales"] for stage in report["stages"]]
    for number, name in enumerate(report["stages"][0]["precisions"]):
        of_stage, colour = [stage["precisions"][name] for stage in report["stages"]], f"C{number}"
        for line, figure_name in (("o--", "cosine"), ("o-", "cosine_of_mean")):
            axes[0].loglog(scales, [1 - each[figure_name] for each in of_stage], line, color=colour)
        axes[1].loglog(scales, [each["noise"] for each in of_stage], "o-", color=colour, label=name)
    axes[0].plot([], [], "k--", label="one batch")
    axes[0].plot([], [], "k-", label="mean of the batches")
    axes[0].set(xlabel="noise levels N", title="1 - cosine with the fp32 gradient")
    axes[1].set(xlabel="noise levels N", title="noise added, share of the sampling variance")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run or of a checkpoint")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    from ict_fast.checkpoint import open_checkpoint  # needs safetensors, which the rest does not

    checkpoint = open_checkpoint(options.run)
    config = from_dict(checkpoint.state["config"])
    training = replace(config.training, batch_size=options.batch_size, micro_batch=0, compile="off")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_torch(device, deterministic=False)  # else a GPU's fp32 is TF32
    steps = {}
    for name in PRECISIONS:
        steps[name] = TrainStep(replace(config, training=replace(training, precision=name)), device)
        steps[name].restore(checkpoint)
    config = steps["fp32"].config
    loader, _ = make_loader(config, open_store(Path(config.data.path)), device)
    with loader:
        batches = [loader.micro_batches(k)[0] for k in range(options.batches)]
    report: dict[str, Any] = {
        "checkpoint": checkpoint.path.name,
        "preset": config.preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tf32": "the GPU's" if device.type == "cuda" else "emulated by rounding the operands to 10 bits",
        "torch": torch.__version__,
        "batches": options.batches,
        "batch_size": options.batch_size,
        "stages": [],
    }
    for stage in stages(config.training.total_steps, config.method):
        found = measure(config, steps, stage.num_scales, batches)
        report["stages"].append({"num_scales": stage.num_scales, "precisions": found})
        print(f"N = {stage.num_scales}: {found}", file=sys.stderr, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "precision.json").write_text(json.dumps(report, indent=1) + "\n")
    about = (
        f"{options.batches} batches of {options.batch_size}, preset {config.preset}, on {report['device']}"
    )
    (options.out / "precision.md").write_text(
        f"Gradients with a trunk in less than fp32 against fp32, by `benchmarks/precision.py`: {about}, torch"
        f" {torch.__version__}. TF32 is {report['tf32']}. The columns are explained in that file.\n\n"
        f"{table(report)}\n![](precision.png)\n"
    )
    plot(report, options.out / "precision.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
