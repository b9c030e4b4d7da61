"""The model card of an export: README.md, for people, with the front matter that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ict_fast.checkpoint import Checkpoint
from ict_fast.config import Config, from_dict, to_dict
from ict_fast.consistency.curriculum import read_extensions
from ict_fast.interop.description import average_of
from ict_fast.interop.imported import KINDS
from ict_fast.screen import MEASURES, asked_sigmas, is_figure
from ict_fast.version import __version__
from ict_kernels.consistency_loss import default_huber_c

_TITLES = {
    "consistency": "A consistency model",
    "denoiser": "A diffusion model (a denoiser)",
    "noise-prediction": "A diffusion model (it predicts noise)",
}
_TAGS = {"consistency": "consistency-model", "denoiser": "diffusion", "noise-prediction": "diffusion"}


def model_card(
    checkpoint: Checkpoint,
    config: Config,
    weights: str,
    form: str,
    usage: str | None = None,
    license_id: str | None = None,
) -> bytes:
    """The card, as a file.

    Args:
        checkpoint: what is exported.
        config: its configuration.
        weights: which group of tensors, as in `export_safetensors`.
        form: "safetensors" or "diffusers".
        usage: how to sample from it, in Markdown; by default with ict-fast.
        license_id: for the front matter, as model hubs spell it; None to name none.
    Raises:
        InputError: if the checkpoint's record of extensions is altered; see `check_state` for the others.
    """
    network, method = config.network, config.method
    metrics = _metrics(checkpoint, weights)
    state = checkpoint.state
    source = state.get("imported")
    origin = source.get("origin") if source else None
    which, again = average_of(checkpoint, weights), ""
    if origin is not None:  # an export that was imported: its model comes from where it said
        source, state = origin["imported"], origin
        weights, step, version = origin["weights"], origin["step"], origin["ict_fast"]
        which = origin.get("average")
        if source is None:
            config = from_dict(origin["config"], str(checkpoint.path / "state.json"))
            again = f" Imported from an export, and exported again by ict-fast {__version__}."
    else:
        step, version = checkpoint.step, __version__
    kind = source["kind"] if source else "consistency"
    size = f"{network.resolution}x{network.resolution}"
    colour = "grey" if network.image_channels == 1 else "RGB"
    classes = f"conditional on {network.num_classes:,} classes" if network.num_classes else "unconditional"
    lines = [
        "---",
        f"library_name: {'diffusers' if form == 'diffusers' else 'ict-fast'}",
        "pipeline_tag: unconditional-image-generation",
        *([] if license_id is None else [f'license: "{license_id}"']),  # quoted: YAML's `no` is a truth value
        "tags:",
        f"- {_TAGS[kind]}",
        "- ict-fast",
        "---",
        "",
        f"# {_TITLES[kind]}: {size} {colour}, {classes}",
        "",
    ]
    if source is not None:
        lines += [
            f"Weights of `{source['file']}` (SHA-256 `{source['sha256']}`, layout {source['layout']}),"
            f" imported and exported by ict-fast {__version__}: {KINDS[source['kind']]}. They are their"
            " authors', whose license applies.",
        ]
    else:
        average = "trained, not averaged" if weights == "weights" else "averaged (EMA)"
        lines += [
            f"Trained by ict-fast {version}, preset `{config.preset}`, {step:,} of"
            f" {config.training.total_steps:,} steps of {config.training.batch_size:,} images; the {average}"
            f" weights, fp32{f': {which}' if which else ''}.{again}",
        ]
        began = state.get("init")
        if began:
            path = began if isinstance(began, str) else began["path"]
            lines += ["", f"Its training began with the weights of `{path}`."]
        if origin is None:
            file = checkpoint.path / "state.json"
            for at, total in read_extensions(state, file, config.training.total_steps):
                lines += ["", f"Until step {at:,} its curriculum was one for {total:,} steps (`--extend`)."]
    lines += [
        "",
        "## How to sample",
        "",
        usage or _usage(),
        "",
        "## Function",
        "",
        "f(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, c_noise(s)), images in [-1, 1].",
        "",
        "| | |",
        "| --- | --- |",
        f"| F | {network.name}, {network.channels} channels x {network.channel_mult} |",
        f"| sigma_data | {method.sigma_data} |",
        f"| f(x, s) = x at s | {method.identity_sigma} |",
        f"| sigma_min, sigma_max, rho | {method.sigma_min}, {method.sigma_max}, {method.rho} |",
        f"| c_noise | {'ln(s) / 4' if network.c_noise == 'log' else '250 ln(s + 1e-44)'} |",
        f"| second step at sigma | {method.second_sigma:.6g} |",
    ]
    if source is None:
        lines += ["", "## Method", "", *_method(config, which)]
    lines += ["", "## Data", "", *_data(config, state, source is not None, origin is None)]
    lines += ["", "## Metrics", "", *metrics]
    lines += ["", "## Configuration", "", "```json", json.dumps(to_dict(config), indent=1), "```", ""]
    return "\n".join(lines).encode(errors="replace")  # paths may hold bytes that are no letters


def _usage() -> str:
    return "\n".join(
        [
            "```console",
            "ict-fast import safetensors THIS_FOLDER --out imported",
            "ict-fast sample imported --count 64 --out samples.png",
            "ict-fast sample imported --count 64 --steps 2 --out two-steps.png",
            "```",
        ]
    )


def _method(config: Config, which: str | None) -> list[str]:
    """`which` average, if it is not the run's own."""
    network, method, optimizer = config.network, config.method, config.optimizer
    curriculum = f"{method.curriculum}, s0 = {method.s0}"
    levels: str = method.indices
    metric: str = method.metric
    teacher: str = method.teacher
    if method.curriculum != "fixed":
        curriculum += f", s1 = {method.s1}"
    if method.indices == "lognormal":
        levels += f", mean {method.p_mean} and deviation {method.p_std} of ln sigma"
    if method.metric == "pseudo-huber":
        default = default_huber_c(network.image_channels * network.resolution**2)
        metric += f", c = {default if method.huber_c is None else method.huber_c:.6g}"
    if method.teacher == "ema":
        divisor = "N" if method.teacher_ema_divisor == "points" else "(N - 1)"
        teacher += f", decay exp(s0 ln {method.teacher_ema} / {divisor})"
    own = "" if which else f", EMA {optimizer.ema_decay}"
    return [
        "| | |",
        "| --- | --- |",
        f"| curriculum | {curriculum} |",
        f"| noise levels | {levels} |",
        f"| weighting | {method.weighting} |",
        f"| metric | {metric} |",
        f"| teacher | {teacher} |",
        f"| optimizer | {optimizer.name}, learning rate {optimizer.lr}{own} |",
        f"| dropout | {network.dropout} |",
        f"| seed | {config.training.seed} |",
    ]


def _data(config: Config, state: Mapping[str, Any], is_theirs: bool, is_here: bool) -> list[str]:
    """Source and crop recipe, from the store's own description where it can still be read.

    Args:
        config: of the training.
        state: with `data_fingerprint`.
        is_theirs: of weights that others trained.
        is_here: trained with this configuration here; else its paths are a stranger's words.
    """
    if is_theirs:
        return ["What these weights were trained on, their publisher says."]
    store = Path(config.data.path)
    fingerprint = state.get("data_fingerprint") or "not recorded"
    lines = [
        f"Store `{store.name}`, fingerprint `{fingerprint}`, flips: {'yes' if config.data.flip else 'no'}."
    ]
    if not is_here:
        return lines
    try:
        meta = json.loads((store / "meta.json").read_text(encoding="utf-8"))
        lines += [f"{name}: {meta[name]}" for name in ("source", "recipe") if isinstance(meta.get(name), str)]
    except (OSError, ValueError, AttributeError):
        lines += ["Its description (meta.json) was not there when this card was written."]
    return ["  \n".join(lines)]


def _metrics(checkpoint: Checkpoint, weights: str) -> list[str]:
    """The newest evaluation of exactly this checkpoint, if there is one; only averages are measured."""
    if weights == "weights":
        return ["None are of these weights: `ict-fast evaluate` measures the averaged ones."]
    name = weights.removeprefix("ema").removeprefix("-") or None
    for folder in (checkpoint.path, checkpoint.path.parent, checkpoint.path.parent.parent):
        result = _read(folder / f"evaluation{weights.removeprefix('ema')}.json")
        if result.get("ema") != name:
            continue  # of other weights
        if result.get("step") == checkpoint.step and result.get("checkpoint") == checkpoint.path.name:
            break
    else:
        return ["None were measured for this checkpoint (`ict-fast evaluate` does)."]
    rows = {
        name.removesuffix("_step"): entry
        for name, entry in result.items()
        if name.endswith("_step") and isinstance(entry, dict) and "frechet_distance" in entry
    }
    columns = [
        measure
        for measure in MEASURES
        if measure[0] == "frechet_distance"
        or any(is_figure(entry.get(measure[0])) for entry in rows.values())
    ]
    lines = [
        f"| steps | {' | '.join(title for _, title, _ in columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for steps, entry in rows.items():
        lines.append(f"| {steps} | {' | '.join(_cell(entry, field, form) for field, _, form in columns)} |")
    features = result.get("features")
    named = features.get("name") if isinstance(features, dict) else features
    facts = [
        words.format(result[key])
        for key, words in (("count", "{:,} samples"), ("seed", "seed {}"))
        if type(result.get(key)) is int
    ]
    if levels := asked_sigmas(result):
        facts.append(levels)
    return [*lines, "", ", ".join([*facts, f"features: {named or 'not named'}."])]


def _cell(entry: dict[str, Any], field: str, form: str) -> str:
    if not is_figure(entry.get(field)):
        return "not available"
    deviation = entry.get(f"{field}_std")
    return form.format(entry[field]) + (f" ± {deviation:.2g}" if is_figure(deviation) else "")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
