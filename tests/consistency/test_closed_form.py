"""A model trained on Gaussian data approaches the consistency function that is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ict_fast.config import MethodConfig
from ict_fast.consistency.curriculum import num_scales, stages
from ict_fast.consistency.model import noise_condition
from ict_fast.consistency.objective import ConsistencyObjective
from ict_kernels import RAdamEMA, c_in, c_out, c_skip

DATA_STD = 0.3
TOTAL_STEPS = 2400
METHOD = MethodConfig(s1=320)


class PixelNetwork(nn.Module):
    """F for one-pixel images: a small MLP of (c_in x, c_noise)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        dropout_seed: Tensor | int | None = None,
        dropout_offset: int = 0,
    ) -> Tensor:
        return self.layers(torch.stack([x.flatten(), noise], dim=1)).view_as(x)


def _consistency_function(network: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    scaled = (c_in(sigma) * x).view(-1, 1, 1, 1)
    return c_skip(sigma) * x + c_out(sigma) * network(scaled, noise_condition(sigma, "log")).flatten()


def _exact(x: Tensor, sigma: Tensor) -> Tensor:
    """The probability-flow ODE of N(0, s^2) data is linear: x scales with sqrt(s^2 + sigma^2)."""
    return x * torch.sqrt((DATA_STD**2 + METHOD.sigma_min**2) / (DATA_STD**2 + sigma**2))


def test_gaussian_data_give_the_linear_consistency_function() -> None:
    torch.manual_seed(0)
    network = PixelNetwork()
    scales = [stage.num_scales for stage in stages(TOTAL_STEPS, METHOD)]
    objective = ConsistencyObjective(network, METHOD, c_noise="log", scales=scales)
    ema_decay = torch.tensor(0.0)
    optimizer = RAdamEMA(network.parameters(), lr=5e-3, ema_decay=ema_decay)
    generator = torch.Generator().manual_seed(1)

    sigma = torch.logspace(-1, 1.9, 8).repeat_interleave(64)
    z = torch.linspace(-2, 2, 64).repeat(8)
    x = z * torch.sqrt(DATA_STD**2 + sigma**2)
    exact = _exact(x, sigma)

    denoiser = x * DATA_STD**2 / (DATA_STD**2 + sigma**2)

    def error(reference: Tensor) -> float:
        """Root mean square over noise levels, in units of the data's standard deviation."""
        with torch.no_grad():
            difference = _consistency_function(network, x, sigma) - reference
        return float(difference.square().mean().sqrt() / DATA_STD)

    assert error(exact) > 0.7, "nothing is learned yet"
    for step in range(TOTAL_STEPS):
        images = DATA_STD * torch.randn((256, 1, 1, 1), generator=generator)
        optimizer.zero_grad()
        count = num_scales(step, TOTAL_STEPS, METHOD)
        objective(images, None, num_scales=count, seed=torch.tensor([0, step])).mean().backward()
        ema_decay.fill_(min(0.998, (step + 1) / (step + 10)))
        optimizer.step()
    with torch.no_grad():
        for parameter, average in zip(network.parameters(), optimizer.ema_parameters(), strict=True):
            parameter.copy_(average)
    assert error(exact) < 0.12
    assert error(denoiser) > 0.5, (
        "the mean E[x | x + sigma z], which a diffusion model learns, is another map"
    )
