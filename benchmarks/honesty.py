"""Does a model of the digits draw, or remember? `python benchmarks/honesty.py RUN [--unconditional RUN]`.

Written: honesty.json and honesty.png,

* neighbours: Euclidean distance, in pixels of [-1, 1], from a sample to the nearest training image, beside
  that from a real digit to the nearest other real digit. A model that copies is nearer than real ones are.
  And from a sample to the nearest other, among as many samples as there are real digits: among more of
  them, any is nearer;
* classes: what the classifier of the evaluation takes the samples for: of a model with classes, which is
  asked for each equally often, and of one without (--unconditional), which has to find the balance itself;
* precision and recall (k-NN manifolds) in the evaluation's features, beside those of one half of the real
  digits against the other, with as many samples as a half has.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from small_png import record_source  # noqa: E402

from ict_fast.checkpoint import open_checkpoint  # noqa: E402
from ict_fast.consistency import load_model, sample  # noqa: E402
from ict_fast.data.pictures import image_grid, save_png, to_uint8  # noqa: E402
from ict_fast.data.store import Store, open_store  # noqa: E402
from ict_fast.errors import InputError  # noqa: E402
from ict_fast.evaluation.features import digits_features  # noqa: E402
from ict_fast.evaluation.manifold import precision_and_recall  # noqa: E402
from ict_fast.evaluation.metrics import halves  # noqa: E402
from ict_fast.version import __version__  # noqa: E402

QUANTILES = (0.01, 0.05, 0.5)


def nearest(images: np.ndarray, others: np.ndarray, *, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and number of, the nearest of `others`.

    Args:
        images, others: uint8 (N, H, W, C) and (M, H, W, C).
        same: both are one set, and an image is not its own neighbour.
    Returns:
        (N,) distances of images scaled to [-1, 1], in float64; (N,) numbers.
    """
    ours, theirs = (torch.from_numpy(set_.reshape(len(set_), -1) / 127.5) for set_ in (images, others))
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    if same:
        distances.fill_diagonal_(torch.inf)
    found = distances.min(1)
    return found.values.numpy(), found.indices.numpy()


def measure(samples: np.ndarray, labels: np.ndarray | None, store: Store) -> dict[str, Any]:
    """The figures, as JSON values.

    Args:
        samples: uint8 (N, H, W, C), at least as many as the store has.
        labels: (N,) classes that were asked for, or None for an unconditional model.
        store: the digits that the model was trained on.
    """
    real = np.array(store.images)
    to_training, _ = nearest(samples, real)
    among_real, _ = nearest(real, real, same=True)
    as_many = samples[: len(real)]
    among_samples, _ = nearest(as_many, as_many, same=True)
    threshold = float(np.quantile(among_real, 0.01))
    features = digits_features()

    def embedded(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return features(torch.from_numpy(images.copy()).permute(0, 3, 1, 2)).numpy()

    first, second = halves(real)
    drawn = samples[: len(second)]
    of_halves = precision_and_recall(embedded(first), embedded(second))
    of_samples = precision_and_recall(embedded(first), embedded(drawn))
    return {
        "count": len(samples),
        "neighbours": {
            "sample_to_training": _quantiles(to_training),
            "real_to_other_real": _quantiles(among_real),
            "sample_to_other_sample": _quantiles(among_samples),
            "copies": int((to_training == 0).sum()),
            "nearer_than_1_percent_of_real": float((to_training < threshold).mean()),
        },
        "classes": _classes(samples, labels, store),
        "manifold": {
            "count": len(drawn),
            "samples": {"precision": of_samples[0], "recall": of_samples[1]},
            "halves": {"precision": of_halves[0], "recall": of_halves[1]},
        },
    }


def _quantiles(distances: np.ndarray) -> dict[str, float]:
    return {f"{100 * q:g} %": float(np.quantile(distances, q)) for q in QUANTILES}


def _classes(samples: np.ndarray, labels: np.ndarray | None, store: Store) -> dict[str, Any]:
    features = digits_features()
    with torch.no_grad():
        predicted = (
            features.classify(features(torch.from_numpy(samples).permute(0, 3, 1, 2))).argmax(1).numpy()
        )
    shares = np.bincount(predicted, minlength=10) / len(predicted)
    real = np.bincount(store.labels, minlength=10) / len(store.labels)
    found: dict[str, Any] = {
        "classifier_accuracy_on_real": features.accuracy,
        "share_drawn": shares.round(4).tolist(),
        "share_real": real.round(4).tolist(),
        "largest_difference": float(np.abs(shares - real).max()),
    }
    if labels is not None:
        right = [float((predicted[labels == digit] == digit).mean()) for digit in range(10)]
        found |= {"as_asked": float((predicted == labels).mean()), "as_asked_by_class": right}
    return found


def section(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    near, manifold = report["neighbours"], report["manifold"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['count']:,} samples in one step from `{report['preset']}`, step {report['step']:,},",
        f"against the {report['training_images']:,} digits that it was trained on"
        f" ({report['date'][:10]}; {versions}; seed {report['training_seed']}).",
        "",
        "| Euclidean distance to the nearest | " + " | ".join(near["real_to_other_real"]) + " |",
        "| --- |" + " ---: |" * len(QUANTILES),
    ]
    for name, key in (
        ("training image, from a sample", "sample_to_training"),
        ("other real digit, from a real digit", "real_to_other_real"),
        ("other sample, from a sample", "sample_to_other_sample"),
    ):
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in near[key].values()) + " |")
    lines += [
        "",
        f"{near['copies']} samples are copies of a training image;"
        f" {near['nearer_than_1_percent_of_real']:.2%} are nearer to one",
        "than the nearest 1 % of real digits are to each other.",
        "",
    ]
    ours, theirs = manifold["samples"], manifold["halves"]
    ratio = near["sample_to_training"]["50 %"] / near["real_to_other_real"]["50 %"]
    lines += [
        f"Precision is {ours['precision']:.3f} and recall {ours['recall']:.3f},"
        f" of {manifold['count']} samples against one half of the",
        f"real digits; the other half has {theirs['precision']:.3f} and {theirs['recall']:.3f}.",
        "",
        f"In the median a sample lies {abs(ratio - 1):.0%} {'farther from' if ratio > 1 else 'nearer to'} the"
        " data than a real digit does. Far from every",
        "training image is also what does not look like a digit: **the distances exclude copying and nothing",
        "more**; how good the samples are, precision and the Fréchet distance say.",
        "",
        *_class_lines(report),
    ]
    return "\n".join(lines) + "\n"


def _class_lines(report: dict[str, Any]) -> list[str]:
    """What the classifier takes the samples for, class by class."""
    classes, free = report["classes"], report.get("unconditional")
    drawn = "samples, each class asked for as often" if "as_asked" in classes else "samples"
    rows = [
        ("real digits, by their labels", classes["share_real"]),
        (f"{drawn}, by the classifier", classes["share_drawn"]),
    ]
    if free is not None:
        rows.append(("samples of a model without classes, by the classifier", free["classes"]["share_drawn"]))
    lines = [
        "| share of each class, in % | " + " | ".join(map(str, range(10))) + " |",
        "| --- |" + " ---: |" * 10,
        *(
            f"| {name} | " + " | ".join(f"{share:.1%}"[:-1] for share in shares) + " |"
            for name, shares in rows
        ),
        "",
    ]
    if "as_asked" in classes:
        worst = min(range(10), key=lambda digit: classes["as_asked_by_class"][digit])
        lines += [
            f"The classifier takes {classes['as_asked']:.1%} of the samples for the class that was asked for",
            f"(fewest: {classes['as_asked_by_class'][worst]:.1%} of the {worst}s). It is right on"
            f" {classes['classifier_accuracy_on_real']:.1%} of real digits that it has not seen.",
        ]
    else:
        lines += [
            f"No class's share of the samples is further than {100 * classes['largest_difference']:.1f}",
            "percentage points from its share of the data.",
        ]
    if free is not None:
        ours = free["manifold"]["samples"]
        lines += [
            f"The model without classes (step {free['step']:,}, seed {free['training_seed']}) is nowhere"
            f" further than {100 * free['classes']['largest_difference']:.1f} percentage",
            f"points from a class's share of the data; precision {ours['precision']:.3f},"
            f" recall {ours['recall']:.3f}.",
        ]
    elif "as_asked" in classes:
        lines.append("A balance that was asked for is no finding; a model without classes was not measured.")
    return lines


def picture(samples: np.ndarray, store: Store, path: Path) -> None:
    """Samples over their nearest training images: left the ten nearest of all, right the first ten drawn."""
    real = np.array(store.images)
    distances, numbers = nearest(samples, real)
    chosen = np.concatenate([np.argsort(distances, kind="stable")[:10], np.arange(10)])
    save_png(image_grid(np.concatenate([samples[chosen], real[numbers[chosen]]]), columns=20), path)


def examine(
    run: Path, count: int, *, classes: bool | None = None
) -> tuple[dict[str, Any], np.ndarray, Store]:
    """Samples of a run, in one step, and their figures.

    Args:
        run: folder of a run of the digits, or of a checkpoint.
        count: how many samples; of a model with classes in turn of each.
        classes: whether the model must have classes; None leaves it open.
    Returns:
        what the run is and the figures, as JSON values; the samples; the digits it was trained on.
    Raises:
        InputError: for a run of other images or the other kind, or for too small a count.
    """
    checkpoint = open_checkpoint(run)
    model = load_model(checkpoint.path)
    store = open_store(Path(model.config.data.path))
    if (store.resolution, store.image_channels) != (8, 1):
        raise InputError(f"{store.path}: holds other images than scikit-learn's digits")
    if count < len(store.images):
        raise InputError(
            f"--count is {count}; it must be at least {len(store.images):,}, as many as real digits"
        )
    number = model.config.network.num_classes
    if classes is not None and classes != bool(number):
        raise InputError(f"{run}: a model with {number} classes; --unconditional takes one without")
    labels = torch.arange(count) % number if number else None
    samples = to_uint8(sample(model, count, labels=labels))
    about = {
        "preset": model.config.preset,
        "step": checkpoint.step,
        "training_seed": model.config.training.seed,
        "training_images": len(store.images),
    }
    return {**about, **measure(samples, None if labels is None else labels.numpy(), store)}, samples, store


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of the digits, or of a checkpoint")
    parser.add_argument(
        "--unconditional", type=Path, metavar="RUN", help="one without classes, for its balance"
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    command = f"python benchmarks/honesty.py {_named(options.run)}"
    try:
        found, samples, store = examine(options.run, options.count)
        if options.unconditional is not None:
            free, _, _ = examine(options.unconditional, options.count, classes=False)
            found["unconditional"] = free
            command += f" --unconditional {_named(options.unconditional)}"
    except InputError as error:
        print(f"honesty.py: error: {error}", file=sys.stderr)
        return 2
    report = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "ict-fast": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        **found,
    }
    path = options.out / "honesty.json"
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    picture(samples, store, path.with_suffix(".png"))
    record_source(path.with_suffix(".png"), path)
    print(section(report))
    return 0


def _named(run: Path) -> Path:
    """A run as a reader may call it: where this machine keeps it is nobody's business."""
    return Path("runs") / run.name if run.is_absolute() else run


if __name__ == "__main__":
    sys.exit(main())
