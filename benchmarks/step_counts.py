"""What a training step asks of a GPU, counted without one: `python benchmarks/step_counts.py`.

One step of each preset runs on fake tensors, which have shapes and no memory: every operation that torch
would dispatch is counted, and the package's own ops run their launchers, so that each Triton launch is.
Written to step-counts.json, which the suite compares with what it counts: a change has to write it anew, on
purpose.

Counted is the step as it stands in Python, not compiled: Inductor fuses the elementwise operations, and can
neither remove a convolution nor a launch of ours. Dispatched as on a CPU, with the trunk in bf16: a GPU's
backend may split an operation in several kernels, and a convolution after nearest upsampling counts with the
9 taps of the network as written, of which a GPU computes 4. Bytes: every operation reads its tensors and
writes its results once, views and allocations apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from flops import flop_counter  # noqa: E402
from step_categories import OPTIMIZER, category  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

import ict_kernels  # noqa: E402
from ict_fast import consistency, presets  # noqa: E402
from ict_fast.config import Config  # noqa: E402
from ict_fast.consistency.objective import ConsistencyObjective  # noqa: E402
from ict_fast.networks import build_network  # noqa: E402
from ict_fast.networks.casts import TrunkCasts  # noqa: E402
from ict_fast.networks.layers import NearestUpsample  # noqa: E402
from ict_kernels import RAdamEMA, _ops, backend  # noqa: E402
from ict_kernels.triton_support import record_launches  # noqa: E402

PATH = ROOT / "benchmarks/results/step-counts.json"
# (preset, images per step and GPU).
STEPS = (("digits", 96), ("cifar10", 512), ("imagenet64", 128))
_NO_LAUNCH = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias")


@dataclass(frozen=True)
class TensorOf:
    """What a tensor was, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Call(NamedTuple):
    """A convolution or attention of a step: the operation's name, its arguments by position, and whether it
    convolves what nearest upsampling gives.
    """

    operation: str
    arguments: tuple[Any, ...]
    upsampled: bool = False


# On a CPU, whose operation it is; a GPU has several, and chooses.
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention backward",
}


def _implementation(op: str) -> Any:
    """The launcher behind one of the package's custom ops."""
    loss, norm, levels, noising, resampling = (
        sys.modules[f"{ict_kernels.__name__}.{name}"]
        for name in ("consistency_loss", "group_norm_silu", "noise_levels", "noising", "fir_resampling")
    )
    return {
        "consistency_loss": loss.launch_loss,
        "consistency_loss_backward": loss.launch_loss_backward,
        "group_norm_silu": norm._forward,
        "group_norm_silu_backward": norm._backward,
        "sample_noise_levels": levels.launch_levels,
        "noise_images": noising.launch_noise,
        "fir_downsample": resampling.launch_down,
        "fir_upsample": resampling.launch_up,
    }[op]


class Counting(TorchDispatchMode):
    """Counts what passes through it.

    Args:
        after_upsampling: weights by which what nearest upsampling gives is convolved.
    Attributes:
        operations: launches of torch's operations, by name.
        kernels: launches of the package's own kernels, by name.
        bytes_moved: by category.
        heavy: every distinct convolution and attention as it stands in Python, biases and slices of gradients
            among its arguments, and how often it comes.
    """

    def __init__(self, after_upsampling: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._after_upsampling = {each.untyped_storage()._cdata for each in after_upsampling}
        self.heavy: Counter[Call] = Counter()
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.bytes_moved: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = options or {}
        if function.namespace == _ops.NAMESPACE:
            called = function._schema.name.split("::")[1]
            with record_launches() as launches:
                result = _implementation(called)(*arguments, **options)
            self.kernels.update(launch.kernel.__name__ for launch in launches)
        else:
            result = function(*arguments, **options)
            called, name = str(function), function._schema.name.split("::")[1]
            if function.namespace == "prim" or function.is_view or name in _NO_LAUNCH:
                return result
            self.operations[name] += 1
            if name in ("convolution", "convolution_backward", *_ATTENTION):
                self.heavy[self._call(_ATTENTION.get(name, name), arguments)] += 1
        tensors, _ = tree_flatten((arguments, options, result))
        self.bytes_moved[category(called)] += sum(
            each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor)
        )
        return result

    def _call(self, operation: str, arguments: tuple[Any, ...]) -> Call:
        def described(each: Any) -> Any:
            if isinstance(each, Tensor):
                return TensorOf(tuple(each.shape), each.stride(), each.dtype)
            return tuple(each) if isinstance(each, list) else each

        storages = {each.untyped_storage()._cdata for each in arguments if isinstance(each, Tensor)}
        upsampled = not storages.isdisjoint(self._after_upsampling)
        return Call(operation, tuple(map(described, arguments)), upsampled)


def count_step(preset: str, batch_size: int) -> dict[str, Any]:
    """`count_config` of a preset."""
    return {"preset": preset, **count_config(presets.get(preset), batch_size)}


def heavy_calls(preset: str, batch_size: int) -> Counter[Call]:
    """The convolutions and attention of one step, each distinct one with its number of times."""
    return _counted(presets.get(preset), batch_size)[1]


def count_config(config: Config, batch_size: int) -> dict[str, Any]:
    """FLOPs, bytes and launches of one training step.

    Returns:
        flops: matrix FLOPs, 2 per multiply-add, as torch's counter has them; bytes by category; launches of
        our kernels by name, and of torch's operations by name.
    """
    return _counted(config, batch_size)[0]


@cache
def _counted(config: Config, batch_size: int) -> tuple[dict[str, Any], Counter[Call]]:
    """`count_config` and `heavy_calls`, which take seconds of a large network."""
    counting, flops, network = _run_step(config, batch_size)
    parameters = sum(p.numel() for p in network.parameters())
    counting.kernels.update(_optimizer_launches(network))
    counting.bytes_moved[OPTIMIZER] += 40 * parameters
    counts = {
        "batch_size": batch_size,
        "parameters": parameters,
        "flops": flops,
        "bytes": dict(sorted(counting.bytes_moved.items())),
        "launches_of_kernels": sum(counting.kernels.values()),
        "launches_of_operations": sum(counting.operations.values()),
        "kernels": dict(sorted(counting.kernels.items())),
        "operations": dict(sorted(counting.operations.items())),
    }
    return counts, counting.heavy


def _run_step(config: Config, batch_size: int) -> tuple[Counting, int, nn.Module]:
    """A step but for the optimizer on fake tensors: what was counted, the FLOPs, and the network."""
    counter = flop_counter()
    stages = consistency.stages(config.training.total_steps, config.method)
    scales = [stage.num_scales for stage in stages]
    with _on_triton():
        with torch.device("meta"):
            network = build_network(config.network)
        objective = ConsistencyObjective(
            network, config.method, c_noise=config.network.c_noise, scales=scales
        )
        with Counting():  # the table of noise levels, which is kept: its logarithms need real numbers
            objective.levels(
                1,
                num_scales=torch.tensor(scales[0]),
                seed=torch.tensor([0, 0]),
                offset=0,
                device=torch.device("cpu"),
            )
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(network)
            casts = TrunkCasts([network], torch.bfloat16)
            counting = Counting(
                block.conv0.cast_weight
                for block in network.blocks()
                if isinstance(block.resample, NearestUpsample)
            )
            images, labels, flip = _batch(config, batch_size)
            seed, num_scales = torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)
            with counter, counting:
                casts.refresh()
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    loss_n = objective(images, labels, num_scales=num_scales, seed=seed, flip=flip)
                (loss_n.sum() / batch_size).backward()
    return counting, counter.get_total_flops(), network


@contextmanager
def _on_triton() -> Iterator[None]:
    """Inside, the ops take fake tensors to their Triton launchers, as they would a GPU's, and convolutions in
    bf16 are in bf16, whatever this processor has."""
    before = backend.runs_on, backend._CPU_CONVOLVES_BADLY
    backend.runs_on = lambda device: True
    backend._CPU_CONVOLVES_BADLY = frozenset()
    try:
        yield
    finally:
        backend.runs_on, backend._CPU_CONVOLVES_BADLY = before


def _make_fake(network: nn.Module) -> None:
    """Gives a network on the meta device fake CPU tensors of the same strides; autocast knows a CPU only."""
    for module in network.modules():
        for name, held in itertools.chain(module._parameters.items(), module._buffers.items()):
            if held is None:
                continue
            fake = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="cpu")
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(fake)
            else:
                module._buffers[name] = fake


def _batch(config: Config, batch_size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    network = config.network
    shape = (batch_size, network.resolution, network.resolution, network.image_channels)
    labels = torch.empty(batch_size, dtype=torch.int64) if network.num_classes else None
    flip = torch.empty(batch_size, dtype=torch.uint8) if config.data.flip else None
    return torch.empty(shape, dtype=torch.uint8), labels, flip


def _optimizer_launches(network: nn.Module) -> list[str]:
    """The launches of a step on as many parameters, on the meta device: the launcher asks for addresses."""
    parameters = [
        nn.Parameter(torch.empty_strided(p.shape, p.stride(), device="meta")) for p in network.parameters()
    ]
    number = torch.empty((), dtype=torch.float64, device="meta")
    optimizer = RAdamEMA(parameters, lr=number, ema_decay=number)
    for p in parameters:
        p.grad = torch.empty_like(p)
    with record_launches() as launches, torch.no_grad():
        optimizer._step_by_kernels([(optimizer.param_groups[0], parameters)], [True])
    return [launch.kernel.__name__ for launch in launches]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PATH, help="the JSON to write")
    options = parser.parse_args(argv)
    counted = [count_step(*step) for step in STEPS]
    options.out.write_text(
        json.dumps({"versions": {"torch": torch.__version__}, "steps": counted}, indent=1) + "\n"
    )
    for step in counted:
        print(
            f"{step['preset']}: {step['flops'] / step['batch_size'] / 1e9:.3g} GFLOP per image,"
            f" {step['launches_of_kernels']} launches of ours, {step['launches_of_operations']} of torch's"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
