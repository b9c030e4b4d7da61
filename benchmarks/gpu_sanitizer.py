"""Every Triton kernel under compute-sanitizer, for part `tests` of run_gpu.py; as a script, what runs there.

The script launches each kernel at small odd shapes, where masks and tails are, and prints their names. It
asks the driver for each tensor by itself, so that an access past the end of one does not fall into another.
What leaves the kernels is looked at on the CPU: no kernel but ours, a copy or a fill runs under the tool.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

TOOLS = ("memcheck", "racecheck")
BINARY = "compute-sanitizer"
MOST_SECONDS = 60.0
# What the tool answers with if it has found something, and says where the machine does not let it.
_FOUND, _REFUSED = 99, "Device not supported"
# (samples, channels, height, width), groups, every other one in 16 bits: resident with masks; with a second
# part; split, with a tail of pixels and of channels; resident in slices; a single pixel.
_NORMS = (
    ((3, 24, 5, 3), 6),
    ((2, 36, 4, 4), 4),
    ((1, 72, 17, 17), 1),
    ((1, 32, 17, 17), 4),
    ((1, 8, 1, 1), 4),
)
# The last is divided among programs.
_IMAGES = ((3, 3, 5, 7), (1, 3, 65, 67))


def sanitize(tool: str, seconds_left: Callable[[], float]) -> dict[str, Any]:
    """What a tool of compute-sanitizer finds in this file's script.

    Args:
        tool: of TOOLS.
        seconds_left: after which the run is ended, or after MOST_SECONDS.
    Returns:
        kernels: the names of those that ran; findings: the tool's own last lines; `error` if there are any.
    """
    binary = shutil.which(BINARY) or shutil.which(f"/usr/local/cuda/bin/{BINARY}")
    if binary is None or not torch.cuda.is_available():
        missing = "a GPU" if binary else BINARY
        return {"not_measured": f"needs {missing}, which is not here"}
    # What the driver answers is not asked about: torch tries what may fail, and looks at the answer itself.
    command = [binary, "--tool", tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]  # not the compilers that it starts
    command += [sys.executable, str(Path(__file__).resolve())]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(1.0, min(MOST_SECONDS, seconds_left()))
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started too
            return {"not_measured": f"did not end within {seconds:.0f} s"}
    if _REFUSED in printed + errors:
        return {"not_measured": f"{BINARY}: {_REFUSED}"}
    return verdict(tool, process.returncode, printed, errors)


def verdict(tool: str, code: int, printed: str, errors: str) -> dict[str, Any]:
    """The record of a run: clean if the script came to its end and the tool found nothing."""
    lines = printed.splitlines()
    kernels = [line.removeprefix("launched ") for line in lines if line.startswith("launched ")]
    findings = [line for line in lines if line.startswith("=========")]
    record = {"kernels": kernels, "findings": findings[:40] + findings[40:][-10:]}
    if code == 0 and kernels:
        return record | {"summary": f"{tool}: clean, {len(kernels)} kernels", "counts": {"passed": 1}}
    last = (findings if code == _FOUND else errors.strip().splitlines() or lines or [""])[-1]
    record["counts"] = {"failed": 1}
    record["error"] = f"{tool}: exit code {code}: {last}"
    record["output"] = (printed + errors)[-4000:]
    return record


# ----------------------------------------------------------------------------------------- what runs under it


@contextmanager
def _names_of_launches() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside."""
    from ict_kernels import triton_support

    modules = [each for each in map(sys.modules.get, list(sys.modules)) if hasattr(each, "launch")]
    modules = [each for each in modules if each.launch is triton_support.launch]  # type: ignore[union-attr]
    names: set[str] = set()
    original = triton_support.launch

    def noted(kernel: Any, *arguments: Any, **named: Any) -> Any:
        names.add(kernel.fn.__name__)
        return original(kernel, *arguments, **named)

    for module in modules:
        module.launch = noted  # type: ignore[union-attr]
    try:
        yield names
    finally:
        for module in modules:
            module.launch = original  # type: ignore[union-attr]


class _Made:
    """Random tensors on a device, drawn on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def image(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Channels last."""
        values = torch.randn(shape, generator=self._generator).to(memory_format=torch.channels_last)
        return values.to(self.device, dtype)


def _norms(made: _Made) -> Iterator[Tensor]:
    from ict_kernels import group_norm_silu

    seed = torch.tensor([1, 2]).to(made.device)
    # The interpreter has no bf16 that rounds.
    dtypes = (torch.float32, torch.bfloat16 if made.device.type == "cuda" else torch.float16)
    for (shape, groups), dtype in zip(_NORMS, cycle(dtypes), strict=False):
        count, channels, *_ = shape
        x = made.image(*shape, dtype=dtype).requires_grad_()
        vectors = [made.normal(channels).requires_grad_() for _ in range(2)]
        rows = [made.normal(count, channels).requires_grad_() for _ in range(3)]
        y = group_norm_silu(
            x,
            groups,
            *vectors,
            scale=rows[0],
            shift=rows[1],
            pre_bias=rows[2],
            dropout=0.3,
            seed=seed,
            layer=1,
        )
        yield y.detach()
        yield from torch.autograd.grad(y, [x, *vectors, *rows], made.image(*shape, dtype=dtype))


def _losses(made: _Made) -> Iterator[Tensor]:
    from ict_kernels import consistency_loss, noise_images, sample_noise_levels

    seed = torch.tensor([1, 2]).to(made.device)
    for shape in _IMAGES:
        count, channels, height, width = shape
        levels = sample_noise_levels(count, torch.tensor(81).to(made.device), seed=seed)
        pixels = torch.arange(count * height * width * channels).to(torch.uint8)
        images = pixels.view(count, height, width, channels).to(made.device)
        flip = torch.tensor([1, 0, 1][:count], dtype=torch.uint8).to(made.device)
        inputs = noise_images(images, levels, seed=seed, flip=flip)
        outputs = [made.image(*shape) for _ in range(2)]
        outputs[0].requires_grad_()
        loss = consistency_loss(*outputs, *inputs, levels)
        yield from (loss.detach(), *inputs, levels.weight)
        yield from torch.autograd.grad(loss, outputs[0], made.normal(count))


def _resampling(made: _Made) -> Iterator[Tensor]:
    from ict_kernels import fir_downsample, fir_upsample

    for shape in ((2, 5, 6, 34), (1, 130, 40, 2)):
        for op in (fir_downsample, fir_upsample):
            x = made.image(*shape).requires_grad_()
            y = op(x)
            yield y.detach()
            yield from torch.autograd.grad(y, x, made.image(*y.shape))


def _optimizer(made: _Made) -> Iterator[Tensor]:
    from ict_kernels import RAdamEMA

    shapes = ((7, 3, 3, 3), (7,), (), (1023,), (4097,))
    parameters = [nn.Parameter(made.normal(*shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = made.normal(*parameter.shape)
    RAdamEMA(parameters, ema_decay=0.9).step()
    yield from (parameter.detach() for parameter in parameters)


def launch_every_kernel(device: torch.device) -> set[str]:
    """One launch or a few of each kernel at small odd shapes; the names of the kernels.

    Raises:
        RuntimeError: if what one wrote is not finite.
    """
    import ict_kernels  # noqa: F401

    made = _Made(device)
    with _names_of_launches() as names:
        for work in (_norms, _losses, _resampling, _optimizer):
            for number, tensor in enumerate(work(made)):
                if not bool(tensor.cpu().isfinite().all()):
                    raise RuntimeError(f"{work.__name__}: tensor {number} is not finite")
    return names


if __name__ == "__main__":
    for name in sorted(launch_every_kernel(torch.device("cuda" if torch.cuda.is_available() else "cpu"))):
        print(f"launched {name}")
