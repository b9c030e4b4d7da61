"""The same training step as a trainer without this package would write it: what whole steps are compared
with.

The network keeps its convolutions (on a GPU those of 1 x 1 and of images are matrix products, the pyramid's
steps single convolutions, and those after nearest upsampling computed before it), attention and parameters;
its norms, its dropout, the blocks' resampling filter, the casts of its weights, the objective and the
optimizer are torch's own. It is spared what makes the package's definitions exact and slow without a kernel:
its noise and dropout come from torch's generators, and student and teacher do not share a dropout mask, which
costs nothing and would be wrong in a real run.

It is in channels_last, where cuDNN is fastest. torch's eager group norm answers in NCHW, and is copied: what
that costs, the same network in NCHW throughout does not pay, but cuDNN then has its own copies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ict_fast import consistency
from ict_fast.config import Config
from ict_fast.consistency.model import noise_condition
from ict_fast.networks.casts import TrunkCasts
from ict_fast.networks.layers import (
    FirDownsample,
    FirUpsample,
    NearestUpsample,
    ResidualBlock,
    SelfAttention,
)
from ict_fast.networks.tf32 import TrunkConv2d
from ict_fast.training.step import TrainStep
from ict_kernels import GroupNormSiLU, NoiseLevels, noise_level_grid, noise_level_probabilities


class TorchNorm(nn.Module):
    """GroupNormSiLU by torch's functions, with the same parameters and arguments."""

    layout = torch.channels_last  # eager torch answers in NCHW

    def __init__(self, norm: GroupNormSiLU) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.silu, self.dropout = norm.activation == "silu", norm.dropout

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_bias: Tensor | None = None,
        seed: Any = None,
        offset: Any = 0,
    ) -> Tensor:
        def column(values: Tensor) -> Tensor:
            return values.to(x.dtype)[..., None, None]

        # Autocast would widen the group norm to fp32, and with it all that follows: twice our bytes.
        with torch.autocast(x.device.type, enabled=False):
            if pre_bias is not None:
                x = x + column(pre_bias)
            y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            if scale is not None and shift is not None:
                y = y * (1 + column(scale)) + column(shift)
            if self.silu:
                y = F.silu(y)
            if self.dropout and seed is not None:
                y = F.dropout(y, self.dropout)
        return y.contiguous(memory_format=self.layout)


class TorchFilter(nn.Module):
    """NCSN++'s resampling by torch's convolution with one filter per channel, as its code bases have it."""

    filter: Tensor

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        plane = torch.outer(taps, taps) / (16 if up else 64)
        self.register_buffer("filter", plane.repeat(channels, 1, 1, 1), persistent=False)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        convolve = F.conv_transpose2d if self.up else F.conv2d
        return convolve(x, self.filter, stride=2, padding=1, groups=x.shape[1])


def use_torchs_layers(network: nn.Module) -> None:
    """Replaces the layers that have kernels of ours, in place; the parameters stay the same objects."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, GroupNormSiLU):
                setattr(module, name, TorchNorm(child))
        if isinstance(module, ResidualBlock) and isinstance(module.resample, FirDownsample | FirUpsample):
            with module.conv0.weight.device:
                module.resample = TorchFilter(module.in_channels, isinstance(module.resample, FirUpsample))


class TorchConvolution(nn.Module):
    """A convolution of the trunk in NCHW, with the same parameters; no product of matrices if it is 1 x 1."""

    def __init__(self, convolution: TrunkConv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = convolution.padding

    def forward(self, x: Tensor, *, with_bias: bool = True) -> Tensor:
        return F.conv2d(x.contiguous(), self.weight, self.bias if with_bias else None, padding=self.padding)


def use_nchw(network: Any) -> None:
    """Takes the blocks of a network of torch's layers to NCHW, in place."""
    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, TorchNorm):
            module.layout = torch.contiguous_format

    def contiguous(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        skip = named.get("skip_nchw")
        named = named if skip is None else named | {"skip_nchw": skip.contiguous()}
        return (inputs[0].contiguous(), *inputs[1:]), named

    for block in network.blocks():
        block.register_forward_pre_hook(contiguous, with_kwargs=True)
        for module in list(block.modules()):
            for name, child in module.named_children():
                if isinstance(child, TrunkConv2d):
                    setattr(module, name, TorchConvolution(child))
                elif isinstance(child, NearestUpsample):
                    setattr(module, name, nn.Upsample(scale_factor=2))
            if isinstance(module, SelfAttention):
                module.qkv.register_forward_hook(_heads_together)


def _heads_together(qkv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Else attention, which wants the channels of a head beside each other, is two products in fp32."""
    return output.contiguous(memory_format=torch.channels_last)


class TorchObjective:
    """Consistency training's loss of each image, (N,), by torch's functions; see ConsistencyObjective."""

    def __init__(self, network: nn.Module, config: Config, device: torch.device) -> None:
        self.network, self.config = network, config
        scales = consistency.num_scales(0, config.training.total_steps, config.method)
        # One N is enough: the time does not depend on it.
        self.grid = noise_level_grid(scales).float().to(device)
        self.cdf = noise_level_probabilities(scales).cumsum(0)[:-1].float().to(device)

    def levels(self, batch_size: int, **ignored: Any) -> NoiseLevels:
        """Noise levels of a batch, drawn from torch's generator."""
        index = torch.searchsorted(self.cdf, torch.rand(batch_size, device=self.cdf.device))
        sigma, sigma_next = self.grid[index], self.grid[index + 1]
        return NoiseLevels(index, sigma, sigma_next, 1 / (sigma_next - sigma))

    def __call__(self, images: Tensor, labels: Tensor | None, levels: NoiseLevels, **ignored: Any) -> Tensor:
        method, c_noise = self.config.method, self.config.network.c_noise
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        flip = ignored.get("flip")
        if flip is not None:
            x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)
        noise = torch.randn_like(x)
        with torch.no_grad():
            teacher = self._denoised(x, noise, levels.sigma, labels, method, c_noise)
        student = self._denoised(x, noise, levels.sigma_next, labels, method, c_noise)
        elements = x[0].numel()
        c = 0.00054 * elements**0.5
        distance = ((student - teacher).flatten(1).square().sum(1) + c**2).sqrt() - c
        return levels.weight * distance

    def _denoised(
        self, x: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None, method: Any, c_noise: str
    ) -> Tensor:
        s = sigma[:, None, None, None]
        noisy = x + s * noise
        variance = s.square() + method.sigma_data**2
        scaled = (noisy * variance.rsqrt()).contiguous(memory_format=torch.channels_last)
        # A seed says that dropout happens; its value is not used.
        output = self.network(scaled, noise_condition(sigma, c_noise), labels, dropout_seed=0)
        skip = method.sigma_data**2 / ((s - method.sigma_min).square() + method.sigma_data**2)
        out = method.sigma_data * (s - method.sigma_min) * variance.rsqrt()
        return skip * noisy + out * output.float()


class TorchOptimizer:
    """torch's foreach RAdam and a foreach average of the weights, where a step expects RAdamEMA."""

    def __init__(self, network: nn.Module, config: Config, device: torch.device) -> None:
        parameters = list(network.parameters())
        optimizer = config.optimizer
        self._radam = torch.optim.RAdam(
            parameters, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, foreach=True
        )
        self._values = [p.detach() for p in parameters]
        self._averages = [p.clone(memory_format=torch.preserve_format) for p in self._values]
        self._decay = optimizer.ema_decay
        self.last_step_skipped = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def step(self) -> None:
        self._radam.step()
        torch._foreach_lerp_(self._averages, self._values, 1 - self._decay)


def make_plain(step: TrainStep, *, nchw: bool = False) -> None:
    """Turns a step of which nothing is compiled yet into torch's own, in place; with `use_nchw`, if asked."""
    use_torchs_layers(step.network)
    if nchw:
        use_nchw(step.network)
    step.casts = TrunkCasts([step.network], None)  # autocast casts the weights wherever they are used
    step.objective = TorchObjective(step.network, step.config, step.device)  # type: ignore[assignment]
    step.optimizer = TorchOptimizer(step.network, step.config, step.device)  # type: ignore[assignment]
