"""`ict-fast import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ict_fast import errors, results
from ict_fast.commands.arguments import at_least
from ict_fast.errors import InputError


@dataclass(frozen=True)
class ImportOptions:
    """Bring in weights of another code base. Nothing in a file is executed, and nothing is downloaded."""

    source: Positional[Literal["openai", "edm", "safetensors", "diffusers"]]
    """openai: ADM of consistency_models or guided-diffusion (.pt). edm: a snapshot of EDM or ECT (.pkl), or a
    state dict. safetensors: a folder of `ict-fast export`. diffusers: a folder of a consistency model."""
    path: Positional[Annotated[Path, arg(metavar="FILE|FOLDER")]]
    """The weights."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: imported/<name>)")] = None
    """Folder to write; sample, evaluate, export and `train --init` take it like a run."""
    kind: Annotated[
        str | None,
        arg(metavar="{consistency,denoiser}", help_behavior_hint="(default: what the file or its name says)"),
    ] = None
    """Whether they are a consistency model's, or a diffusion model's of EDM's kind."""
    resolution: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(openai: default as published)")
    ] = None
    """Height and width of the images in pixels."""
    head_channels: Annotated[int | None, arg(metavar="N", help_behavior_hint="(openai: default 64)")] = None
    """Channels per attention head."""
    second_sigma: Annotated[
        float | None, arg(metavar="SIGMA", help_behavior_hint="(default: as published or exported, or 0.821)")
    ] = None
    """Noise level of the second sampling step, such as `ict-fast search-sigma` finds."""
    attention_order: Annotated[
        str | None,
        arg(metavar="{new,legacy}", help_behavior_hint="(openai: default as published)"),
    ] = None
    """Of guided-diffusion: its option use_new_attention_order, which leaves no trace in the weights."""


def run(options: ImportOptions) -> int:
    """Runs the command; returns its exit code."""
    name = options.path.stem if options.path.suffix else options.path.name
    out = Path("imported") / name if options.out is None else options.out
    _check_options(options)
    results.require_weights_place(out, "--out")
    if not options.path.exists():
        raise InputError(f"{options.path}: does not exist")

    from ict_fast.interop.imported import KINDS, require_new, save, with_second_sigma

    require_new(out)
    if options.source == "openai":
        from ict_fast.interop.openai import import_openai

        model = import_openai(
            options.path,
            kind=options.kind,
            resolution=options.resolution,
            head_channels=options.head_channels,
            attention_order=options.attention_order,
        )
    elif options.source == "edm":
        from ict_fast.interop.edm import import_edm

        model = import_edm(options.path, kind=options.kind)
    elif options.source == "safetensors":
        from ict_fast.interop.export import import_safetensors

        model = import_safetensors(options.path)
    else:
        from ict_fast.interop.diffusers import import_diffusers

        model = import_diffusers(options.path)
    if options.second_sigma is not None:
        model = with_second_sigma(model, options.second_sigma)
    save(model, out)

    network = model.config.network
    size = f"{network.resolution}x{network.resolution}"
    classes = f"{network.num_classes:,} classes" if network.num_classes else "no classes"
    parameters = sum(tensor.numel() for tensor in model.tensors.values())
    print(f"{options.path}: {network.name}, {size}, {classes}, {parameters:,} numbers in {out}")
    for note in model.notes:
        print(f"  {errors.visible(note)}")  # it may quote the file
    print(f"This is {KINDS[model.kind]}.")
    return errors.EXIT_DONE


def _check_options(options: ImportOptions) -> None:
    """Raises InputError for an option that does not belong to the source, or is out of range."""
    theirs = {
        "openai": ("kind", "resolution", "head_channels", "attention_order"),
        "edm": ("kind",),
    }.get(options.source, ())
    for name in ("kind", "resolution", "head_channels", "attention_order"):
        if getattr(options, name) is not None and name not in theirs:
            raise InputError(f"--{name.replace('_', '-')} does not belong to {options.source}; leave it out")
    for name in ("resolution", "head_channels"):
        if (number := getattr(options, name)) is not None:
            at_least(1, name.replace("_", "-"), number)
