"""The variants of part `step`: each makes a network of its own, and says what advances it by a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_baselines import INDUCTOR, TUNED
from gpu_step_blocks import OURS, compile_as
from plain_network import make_plain

from ict_fast.config import Config
from ict_fast.training.step import TrainStep

Advance = Callable[[int, Sequence[Any]], None]
# -> what advances a run by a step, and the state that it advances.
Variant = Callable[[Config, torch.device], tuple[Advance, TrainStep]]


def _ours(compiled: str, config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    step = TrainStep(replace(config, training=replace(config.training, compile=compiled)), device)
    return step, step


def _as_written(config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    """Convolutions after nearest upsampling as the network is written, and not before it."""
    _, step = _ours("on", config, device)
    for block in step.network.blocks():
        setattr(block, "_convolves_before_upsampling", lambda x_nchw: False)  # noqa: B010, for mypy
    return step, step


def _captured(config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    """`--training.cuda-graph`: the compiled step as two graphs."""
    from ict_fast.training.graph import CapturedStep

    _, step = _ours("on", config, device)
    return CapturedStep(step), step


def _plain(config: Config, device: torch.device, *, nchw: bool = False) -> tuple[Advance, TrainStep]:
    _, step = _ours("off", config, device)
    make_plain(step, nchw=nchw)
    return step, step


def _inductor(name: str, config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    """Plain torch in compiled blocks, as ours are."""
    _, step = _plain(config, device)
    compile_as(name, step.network)
    return step, step


PLAIN, CAPTURED, UNCOMPILED = "torch, uncompiled", "ict-fast, CUDA graph", "ict-fast, uncompiled"
PLAIN_NCHW = "torch, uncompiled, NCHW"
AUTOTUNED, FLOOR = "ict-fast, max-autotune", "convolutions and attention alone"
AS_WRITTEN = "ict-fast, convolving after upsampling"
VARIANTS: dict[str, Variant] = {
    OURS: partial(_ours, "on"),
    TUNED: partial(_inductor, TUNED),
    INDUCTOR: partial(_inductor, INDUCTOR),
    PLAIN: _plain,
    PLAIN_NCHW: partial(_plain, nchw=True),
    CAPTURED: _captured,
    UNCOMPILED: partial(_ours, "off"),
    AUTOTUNED: partial(_ours, "max-autotune"),
    AS_WRITTEN: _as_written,
}
# In the order of measuring, with the words that `--variants` takes.
WORDS = {
    "ours": OURS,
    "floor": FLOOR,
    "tuned": TUNED,
    "inductor": INDUCTOR,
    "plain": PLAIN,
    "plain-nchw": PLAIN_NCHW,
    "as-written": AS_WRITTEN,
    "graph": CAPTURED,
    "uncompiled": UNCOMPILED,
    "max-autotune": AUTOTUNED,
}
# One tries many kernels for each convolution, and can use up a part's time by itself; the other is for ADM.
ON_REQUEST = (AUTOTUNED, AS_WRITTEN)
QUICK = (FLOOR, PLAIN, PLAIN_NCHW, UNCOMPILED)  # nothing is compiled for them
CPU_VARIANTS = (UNCOMPILED, PLAIN)
