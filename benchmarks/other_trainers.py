"""Other code bases' losses and blocks, restated from their conventions: what the drop-in is compared with.

Nothing here is theirs; each piece says in its own words what theirs computes: the order of the random draws,
shapes, dtypes, what is returned, and what is wrong by the paper. Read at: openai/consistency_models e32b69e,
locuslab/ect 4311059, Kinyugo/consistency_models 2e6618d, diffusers 58eb52c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5


def spread(values_n: Tensor, like: Tensor) -> Tensor:
    return values_n.reshape(-1, *[1] * (like.dim() - 1))


def ascending_grid(levels: int, device: torch.device | None = None) -> Tensor:
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (low + torch.arange(levels, device=device) / (levels - 1) * (high - low)) ** RHO


# ------------------------------------------------------------------------------ openai/consistency_models


class KarrasDenoiser:
    """Consistency training of 2023 with the L2 norm: uniform indices, a descending grid, uniform weight."""

    def __init__(self, distillation: bool = True) -> None:
        self.distillation = distillation
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA

    def denoise(self, model: Any, x_t: Tensor, sigmas: Tensor, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        sigma, variance = spread(sigmas, x_t), self.sigma_data**2
        above = sigma - self.sigma_min if self.distillation else sigma
        output = model(x_t / (sigma**2 + variance).sqrt(), 250 * torch.log(sigmas + 1e-44), **model_kwargs)
        c_out = above * self.sigma_data / (sigma**2 + variance).sqrt()
        return output, c_out * output + variance / (above**2 + variance) * x_t

    def consistency_losses(
        self,
        model: Any,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Any] | None = None,
        target_model: Any = None,
        teacher_model: Any = None,
        teacher_diffusion: Any = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if teacher_model is not None:
            return {
                "loss": torch.full((x_start.shape[0],), 7.0)
            }  # distillation; what it does is not at issue
        noise = torch.randn_like(x_start) if noise is None else noise
        index = torch.randint(0, num_scales - 1, (x_start.shape[0],), device=x_start.device)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        t, t2 = ((high + each / (num_scales - 1) * (low - high)) ** self.rho for each in (index, index + 1))
        state = torch.get_rng_state()  # of the CPU, whatever the device
        student = self.denoise(model, x_start + spread(t, x_start) * noise, t, **(model_kwargs or {}))[1]
        torch.set_rng_state(state)
        with torch.no_grad():
            x_t2 = x_start + spread(t2, x_start) * noise
            teacher = self.denoise(target_model, x_t2, t2, **(model_kwargs or {}))[1]
        return {"loss": (student - teacher).square().flatten(1).mean(1)}


# -------------------------------------------------------------------------------------------- locuslab/ect


def ect_draws(
    images: Tensor, p_mean: float, p_std: float, augment_pipe: Any = None
) -> tuple[Tensor, Tensor, Any, Tensor]:
    """(t (N, 1, 1, 1), images, augment labels, noise), in ECT's order."""
    t = (torch.randn([len(images), 1, 1, 1], device=images.device) * p_std + p_mean).exp()
    y, augment_labels = augment_pipe(images) if augment_pipe is not None else (images, None)
    return t, y, augment_labels, torch.randn_like(y)


class ECMLoss:
    """ECT's loss; a GPU's generator is rewound for the teacher (on a CPU theirs fails, this does not)."""

    def __init__(self, q: float = 2, c: float = 0.0, k: float = 8.0, b: float = 1.0) -> None:
        self.q, self.c, self.k, self.b, self.stage = q, c, k, b, 0

    def __call__(self, net: Any, images: Tensor, labels: Tensor | None = None) -> Tensor:
        t, y, augment_labels, noise = ect_draws(images, -1.1, 2.0)
        r = (t * (1 - (1 + self.k * torch.sigmoid(-self.b * t)) / self.q ** (self.stage + 1))).clamp(min=0)
        state = torch.cuda.get_rng_state() if images.is_cuda else None
        student = net(y + noise * t, t, labels, augment_labels=augment_labels)
        if r.max() > 0:  # waits for the device
            if state is not None:
                torch.cuda.set_rng_state(state)
            with torch.no_grad():
                teacher = torch.nan_to_num(net(y + noise * r, r, labels, augment_labels=augment_labels))
            teacher = (r > 0) * teacher + (r <= 0) * y
        else:
            teacher = y
        squared = (student - teacher).square().flatten(1).sum(1)
        distance = (squared + self.c**2).sqrt() - self.c if self.c > 0 else squared.sqrt()
        return distance / (t - r).flatten()


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """How EDM's and EDM2's trainers make their loss: a dotted path, options by name."""
    module, _, name = class_name.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)(*args, **kwargs)


class EDMPrecond(nn.Module):
    """EDM's networks as their trainers call them: sigma in any shape of N elements, denoised images out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        variance = sigma**2 + SIGMA_DATA**2
        output = self.network(x / variance.sqrt(), sigma.flatten().log() / 4)
        return SIGMA_DATA**2 / variance * x + sigma * SIGMA_DATA / variance.sqrt() * output


# ------------------------------------------------------------------ diffusers: train_cm_ct_unconditional.py


def get_input_preconditioning(sigmas: Tensor, sigma_data: float = 0.5, input_precond_type: str = "cm") -> Any:
    """c_in without its square root; 1 for "none"."""
    return 1 if input_precond_type == "none" else 1 / (sigmas**2 + sigma_data**2)


def scalings_for_boundary_conditions(
    timestep: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """c_skip with its boundary at 0, and c_out without sigma_data."""
    scaled = timestep * timestep_scaling
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / (scaled**2 + sigma_data**2).sqrt()


def diffusers_loss(student: Tensor, teacher: Tensor, lambda_t: Tensor, huber_c: float) -> Tensor:
    """Per element, then the mean."""
    return (lambda_t * (((student.float() - teacher.float()) ** 2 + huber_c**2).sqrt() - huber_c)).mean()


def conditional_loss(
    model_pred: Tensor, target: Tensor, reduction: str = "mean", loss_type: str = "l2", huber_c: Any = 0.1
) -> Tensor:
    """Of the scheduled-Huber scripts: 2 c (sqrt(e^2 + c^2) - c), or without the factor c."""
    error = model_pred - target
    if loss_type == "l2":
        loss = error**2
    else:
        loss = 2 * ((error**2 + huber_c**2).sqrt() - huber_c) * (huber_c if loss_type == "huber" else 1)
    return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]


# ------------------------------------------------------------------------------ Kinyugo/consistency_models


def pseudo_huber_loss(input: Tensor, target: Tensor) -> Tensor:
    """Per element, with the c of the whole image."""
    c = 0.00054 * math.sqrt(math.prod(input.shape[1:]))
    return torch.sqrt((input - target) ** 2 + c**2) - c


def lognormal_timestep_distribution(
    num_samples: int, sigmas: Tensor, mean: float = -1.1, std: float = 2.0
) -> Tensor:
    cdf = torch.erf((sigmas.log() - mean) / (std * math.sqrt(2)))
    return torch.multinomial(cdf.diff() / cdf.diff().sum(), num_samples, replacement=True)


class ImprovedConsistencyTraining:
    """One step: images of student and teacher, and weights (N, 1, 1, 1); two different dropout masks."""

    num_timesteps = 11

    def __call__(self, model: Any, x: Tensor, step: int, total_steps: int, **kwargs: Any) -> SimpleNamespace:
        sigmas = ascending_grid(self.num_timesteps, x.device)
        noise = torch.randn_like(x)
        index = lognormal_timestep_distribution(x.shape[0], sigmas)

        def denoised(sigma_n: Tensor) -> Tensor:
            x_t, sigma, variance = x + spread(sigma_n, x) * noise, spread(sigma_n, x), SIGMA_DATA**2
            c_skip = variance / ((sigma - SIGMA_MIN) ** 2 + variance)
            c_out = SIGMA_DATA * (sigma - SIGMA_MIN) / (sigma**2 + variance).sqrt()
            return c_skip * x_t + c_out * model(x_t, sigma_n, **kwargs)  # x_t, not c_in x_t

        predicted = denoised(sigmas[index + 1])
        with torch.no_grad():
            target = denoised(sigmas[index])
        weights = spread(1 / sigmas.diff()[index], x)
        return SimpleNamespace(predicted=predicted, target=target, loss_weights=weights)


# ------------------------------------------------------------------------------------------------- networks


class GroupNorm32(nn.GroupNorm):
    """guided-diffusion's: fp32 inside."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).type(input.dtype)


class ResBlock(nn.Module):
    """guided-diffusion's block: its last convolution starts at 0; with scale-shift it indexes out_layers."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        updown: Callable[[Tensor], Tensor] | None = None,
        num_groups: int = 8,
    ) -> None:
        super().__init__()
        out = out_channels or channels
        self.channels, self.use_scale_shift_norm, self.updown = (
            channels,
            use_scale_shift_norm,
            updown is not None,
        )
        norms = GroupNorm32(num_groups, channels), GroupNorm32(num_groups, out)
        self.in_layers = nn.Sequential(norms[0], nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.h_upd = self.x_upd = updown
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out if use_scale_shift_norm else out)
        )
        last = nn.Conv2d(out, out, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.out_layers = nn.Sequential(norms[1], nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        embedding = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + embedding)
        return self.skip_connection(x) + h


class Unet(nn.Module):
    """A small U-Net of such blocks: two resolutions, network(x, noise embedding (N,))."""

    def __init__(
        self, channels: int, blocks: int, dropout: float, num_groups: int = 8, image_channels: int = 3
    ) -> None:
        super().__init__()
        wide, options = 2 * channels, {"use_scale_shift_norm": True, "num_groups": num_groups}
        self.channels = channels
        self.embed = nn.Sequential(nn.Linear(channels, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.first = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(channels, wide, dropout, **options) for _ in range(blocks))
        self.wider = ResBlock(channels, wide, dropout, wide, **options)
        self.middle = nn.ModuleList(ResBlock(wide, wide, dropout, **options) for _ in range(blocks))
        self.up = nn.ModuleList(
            ResBlock(each, wide, dropout, channels, **options)
            for each in [wide + channels] + [2 * channels] * (blocks - 1)
        )
        self.out = nn.Sequential(
            GroupNorm32(num_groups, channels), nn.SiLU(), nn.Conv2d(channels, image_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, noise: Tensor, **_: Any) -> Tensor:
        frequencies = torch.arange(self.channels, device=x.device)
        emb = self.embed((noise.float()[:, None] * 0.01 * frequencies).cos())
        h, kept = self.first(x), []
        for block in self.down:
            h = block(h, emb)
            kept.append(h)
        h = self.wider(F.avg_pool2d(h, 2), emb)
        for block in self.middle:
            h = block(h, emb)
        h = F.interpolate(h, scale_factor=2.0)
        for block in self.up:
            h = block(torch.cat([h, kept.pop()], dim=1), emb)
        return self.out(h)
