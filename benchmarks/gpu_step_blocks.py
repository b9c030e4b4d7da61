"""The compiled blocks of part `step`: as each variant has them, and one by one beforehand in other processes.

A step of ADM-64 runs 24 kinds of blocks, each with and without gradients, and every variant has
code of its own: minutes on one core. A block needs its inputs' shapes and no network around it, so that a
core each can compile them; Inductor's cache knows them again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cache_keys import kept_keys
from compilers import compile_beside, dismiss
from gpu_baselines import INDUCTOR, RAISED_THRESHOLDS, TUNED, set_reductions
from plain_network import use_torchs_layers
from torch import Tensor, nn

from ict_fast.config import Config
from ict_fast.networks import build_network
from ict_fast.networks.casts import TrunkCasts
from ict_fast.training.compilation import compile_blocks
from ict_fast.training.launch import configure_torch
from ict_fast.training.step import trunk_dtype
from ict_kernels.philox import layer_seeds

OURS = "ict-fast"
COMPILED = (OURS, TUNED, INDUCTOR)


def compile_as(name: str, network: Any) -> None:
    """Compiles the blocks of a network, in place, as the variant of COMPILED does; its norms are in it."""
    compile_blocks(network)
    if name != OURS:
        set_reductions()
    if name == TUNED:
        for block in network.blocks():
            block.compile(fullgraph=True, dynamic=False, options=RAISED_THRESHOLDS)


def compile_beforehand(name: str, config: Config, seconds: float) -> dict[str, Any]:
    """Compiles the blocks of a variant of COMPILED.

    Returns:
        The number of blocks, of those that had ended, the seconds that it took, at most about `seconds`, and
        the errors of others. These are said at once: the variant, which compiles all that then, takes long.
    """
    started = time.monotonic()
    work = block_work(name, config)
    outcomes = compile_beside(work, seconds)
    dismiss()
    errors = sorted(set(outcomes) - {"ended", "given up"})
    for error in errors:
        print(f"    compiled beforehand: {error}", file=sys.stderr, flush=True)
    return {
        "blocks": len(work),
        "ended": outcomes.count("ended"),
        "seconds": round(time.monotonic() - started, 1),
        "errors": errors,
    }


def block_work(name: str, config: Config) -> list[Callable[[], None]]:
    """What compiles the distinct blocks of a variant, for `compile_beside`."""
    with torch.device("meta"):  # where torch's norms cannot be called
        network = build_network(config.network)
    shapes_of: dict[nn.Module, tuple[tuple[int, ...] | None, ...]] = {}  # in the order in which they run

    def note(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        skip = named.get("skip_nchw")
        shapes_of[block] = tuple(inputs[0].shape), None if skip is None else tuple(skip.shape)

    for block in network.blocks():
        block.register_forward_pre_hook(note, with_kwargs=True)
    sizes = config.network
    with torch.device("meta"):
        x = torch.empty(config.training.batch_size, sizes.image_channels, sizes.resolution, sizes.resolution)
        labels = torch.zeros(len(x), dtype=torch.int64) if sizes.num_classes else None
        network(x, torch.empty(len(x)), labels)
    numbers = {block: number for number, block in enumerate(network.blocks())}
    work = {}
    for turn, (block, shapes) in enumerate(shapes_of.items()):
        compiling = partial(_compile_block, name, config, numbers[block], turn, *shapes)
        work.setdefault((repr(block), shapes), compiling)
    return list(work.values())


@kept_keys()
def _compile_block(
    name: str,
    config: Config,
    number: int,
    turn: int,
    shape: tuple[int, ...],
    skip_shape: tuple[int, ...] | None,
) -> None:
    """In another process: runs a block as a step does, on whatever stands in memory.

    Args:
        number: of the block among `network.blocks()`.
        turn: how many blocks run before it; a step compiles the first of a kind that runs.
    """
    device = torch.device("cuda")
    configure_torch(device, deterministic=False)
    torch.backends.cudnn.benchmark = False  # tries algorithms for nobody, and is in no key of the caches
    torch.compiler.reset()
    with torch.device("meta"):
        network = build_network(config.network)
    if name != OURS:
        use_torchs_layers(network)
    compile_as(name, network)
    block = list(network.blocks())[number].to_empty(device=device)
    dtype = trunk_dtype(config.training.precision, device)
    TrunkCasts([block], dtype if name == OURS else None)

    def activations(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)

    x, skip = activations(shape), None if skip_shape is None else activations(skip_shape)
    embedding = torch.empty(shape[0], 4 * config.network.channels, device=device)
    dropout: tuple[int | Tensor, ...] = (0, 0)
    if name == OURS:
        dropout = seed_of(network, turn, device), torch.tensor(0, device=device)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        with torch.no_grad():
            block(x, embedding, *dropout, skip_nchw=skip)
        for each in (x, embedding, skip):
            if each is not None:
                each.requires_grad_()
        y = block(x, embedding, *dropout, skip_nchw=skip)
    y.backward(torch.empty_like(y))
    torch.cuda.synchronize()
    del block, network, x, skip, y
    torch.cuda.empty_cache()


def seed_of(network: Any, turn: int, device: torch.device) -> Tensor:
    """A block's seed as a step has it, one row of those of all blocks.

    Where a row begins, and how long all are, is in the key of a backward pass in Inductor's cache: on a GPU,
    of what a forward pass keeps.
    """
    run_seed = torch.zeros(2, dtype=torch.int64, device=device)
    return layer_seeds(run_seed, network.block_count, device).unbind()[turn]
