"""Compiling a network block by block: each kind of block once per use, never again, and never by half.

Blocks that differ in nothing but their weights share what was compiled: the CIFAR-10 preset's 33 are of 14
kinds, ADM-64's 36 of 24. So whatever else tells blocks apart, such as the number of a layer, must come to
them as a tensor. One by one, they compile in 0.7 of the time of the whole network, and with several processes
their gradients are reduced while earlier blocks still compute theirs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import nn

import ict_kernels
from ict_fast import networks
from ict_fast.networks.layers import ResidualBlock
from ict_fast.version import __version__

# Student and teacher, with and without gradients, of two batch sizes: what a block may be compiled for.
_GRAPHS_PER_BLOCK = 8


def compiles(asked: str, device: torch.device) -> bool:
    """Whether `--training.compile` means to compile on this device: "auto" does on a GPU."""
    return asked in ("on", "max-autotune") or (asked == "auto" and device.type == "cuda")


def compile_blocks(*networks: nn.Module, autotune: bool = False) -> int:
    """Compiles every residual block, in place, when it is first called; names and state dicts stay.

    A graph break, or more compilations than the blocks can need, is an error: the rest would run slowly, and
    say nothing.

    Args:
        networks: the student, and the teacher if it is another one.
        autotune: try several kernels for each matrix product and convolution, which takes much longer.
    Returns:
        The number of blocks.
    """
    import torch._dynamo  # a second of a process's start, which most that import this do not need

    _configure()
    blocks = [
        block for network in networks for block in network.modules() if isinstance(block, ResidualBlock)
    ]
    # Blocks share their code, and the limit counts per piece of code.
    limit = max(torch._dynamo.config.recompile_limit, _GRAPHS_PER_BLOCK * len(blocks))
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, limit
    )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    mode = "max-autotune-no-cudagraphs" if autotune else None
    if autotune:
        # Else timing says, of student and teacher apart, where a product is rounded: they are one function.
        torch._inductor.config.benchmark_epilogue_fusion = False
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, mode=mode)
    return len(blocks)


def _configure() -> None:
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor's advice to allow TF32 everywhere: where it may be is --training.precision's to say.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    torch._dynamo.config.optimize_ddp = False  # it would cut the graphs where the gradients are reduced
    # Backward passes as in eager mode. By itself torch compiles them under the autocast of the call, and what
    # leaves autocast in its forward pass, as the noise embedding does, would be differentiated in bf16.
    torch._functorch.config.backward_pass_autocast = "off"
    # Inductor chooses kernels by timing, of equal runs not always the same, unless it is told here too.
    if hasattr(torch._inductor.config, "deterministic"):
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    # Wrong gradients in torch 2.13 (pytorch issue 193061); the name is read when Inductor is imported.
    triton = torch._inductor.config.triton
    if hasattr(triton, "mix_order_reduction"):
        triton.mix_order_reduction = False
    # The networks are channels_last throughout. By itself, torch 2.13 does not count the convolutions of a
    # backward pass and lays it out as NCHW on a GPU (pytorch issue 189239), and blocks that halve their
    # channels too. The variable is Inductor's own, to compare.
    layout = os.environ.get("TORCHINDUCTOR_FORCE_LAYOUT_OPT", "1") == "1"
    torch._inductor.config.force_layout_optimization = layout
    _let_torch_keep_what_autograd_makes()
    # Importing Inductor has set the name to a folder in /tmp unless the user had: that is not kept for long.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder())
    # What Inductor does itself when it compiles its first kernel, after some of ours: Triton asks for the
    # version of its assembler once, and would keep what the two made under one name.
    ptxas = Path(torch.__file__).parent / "bin/ptxas"
    if os.access(ptxas, os.X_OK):
        os.environ.setdefault("TRITON_PTXAS_PATH", str(ptxas))


def _let_torch_keep_what_autograd_makes() -> None:
    """Makes a second start trace no backward pass, where torch's cache by itself takes none of these graphs.

    It knows neither entering autocast or inference mode, whose arguments are in its keys, nor autograd's
    functions, whose code it cannot see. So that code is in the keys; that of our ops is in their names.
    """
    inductor, functorch = torch._inductor.config, torch._functorch.config
    if hasattr(inductor, "unsafe_marked_cacheable_functions"):
        modes = "torch.amp.autocast_mode._{}_autocast", "torch.autograd.grad_mode._{}_inference_mode"
        names = [mode.format(way) for mode in modes for way in ("enter", "exit")]
        known = dict.fromkeys(names, _digest_of_code())
        inductor.unsafe_marked_cacheable_functions = inductor.unsafe_marked_cacheable_functions | known
        if hasattr(functorch, "autograd_cache_allow_custom_autograd_functions"):
            functorch.autograd_cache_allow_custom_autograd_functions = True


@functools.cache
def _digest_of_code() -> str:
    """Of the networks' and the kernels' files."""
    digest = hashlib.sha256()
    for package in (networks, ict_kernels):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where compiled code stays from one start to the next: by version of torch and by kind of device."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return home / "ict-fast" / f"{__version__}-torch-{torch.__version__}-{device}"
