"""The consistency function f(x, sigma): a network and its preconditioning."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ict_fast.config import Config, from_dict
from ict_fast.errors import InputError
from ict_fast.networks import UNet, build_network
from ict_kernels import c_in, c_out, c_skip


def noise_condition(sigma: Tensor, kind: str) -> Tensor:
    """c_noise(sigma), what the network is told of the noise level, in fp32.

    Args:
        sigma: (N,) noise levels.
        kind: "log" for ln(sigma)/4 (Karras et al. 2022, table 1), "adm-openai" for 250 ln(sigma + 1e-44)
            (the convention of the released ADM consistency models).
    """
    if kind == "log":
        return sigma.float().log() / 4
    return 250 * (sigma.float() + 1e-44).log()


class ConsistencyModel(nn.Module):
    """f(x, s) = c_skip(s) x + c_out(s) F(c_in(s) x, c_noise(s)), with f(x, sigma_min) = x exactly.

    (iCT, equation 6 and section 2; Song et al. 2023, appendix C.)

    Attributes:
        config: of the run.
        data_fingerprint: of the images that it was trained on, see `Store.fingerprint`; None if not known.
    """

    def __init__(self, config: Config, network: nn.Module | None = None) -> None:
        """Draws fresh weights from config.training.seed unless a network is given."""
        super().__init__()
        self.config = config
        self.data_fingerprint: str | None = None
        self.network = build_seeded_network(config) if network is None else network

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised image.

        Args:
            x: (N, C, H, W) float, image plus noise of standard deviation sigma; images are in [-1, 1].
            sigma: (N,) or a number, between sigma_min and sigma_max.
            labels: (N,) int64 class numbers for a class-conditional model.
        Returns:
            (N, C, H, W) fp32.
        Raises:
            InputError: for images or labels that the model was not built for.
        """
        if labels is not None and self.config.network.num_classes and _can_be_read(labels):
            check_classes(labels, self.config.network.num_classes)
        method = self.config.method
        x = x.float()
        sigma_n = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        sigma_n111 = sigma_n.view(-1, 1, 1, 1)
        scaled = (c_in(sigma_n111, sigma_data=method.sigma_data) * x).contiguous(
            memory_format=torch.channels_last
        )
        output = self.network(scaled, noise_condition(sigma_n, self.config.network.c_noise), labels)
        skip = c_skip(sigma_n111, sigma_data=method.sigma_data, sigma_min=method.identity_sigma)
        out = c_out(sigma_n111, sigma_data=method.sigma_data, sigma_min=method.identity_sigma)
        return skip * x + out * output


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Refuses labels (N,) that are no class numbers, which it reads on the host: a network ignores some.

    Raises:
        InputError: with the type or the numbers seen.
    """
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        dtype = str(labels.dtype).removeprefix("torch.")
        raise InputError(f"labels are of type {dtype}; they must be whole numbers")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(f"labels must lie in 0..{num_classes - 1}; seen: {labels.min()}..{labels.max()}")


def _can_be_read(tensor: Tensor) -> bool:
    """Whether its values are known: not while torch compiles or captures."""
    return not (
        tensor.is_meta
        or torch.compiler.is_compiling()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def build_seeded_network(config: Config) -> UNet:
    """The network with weights drawn from config.training.seed, leaving torch's generators untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.training.seed)  # torch.manual_seed would seed GPUs too
        return build_network(config.network)


def load_model(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
) -> ConsistencyModel:
    """The model of a run or a checkpoint, ready to sample: averaged weights, evaluation mode.

    Args:
        path: a run's directory (its newest whole checkpoint) or a checkpoint's.
        weights: "ema" for the average, "weights" for the trained weights themselves.
        device: where to.
    Raises:
        InputError: if nothing whole is there, the weights do not fit the stored configuration, or there is no
            such GPU.
    """
    device = torch.device(device)
    seen = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= seen:
        raise InputError(f"device is {device}, but torch sees {seen} GPUs; `ict-fast doctor` says why")
    from ict_fast.checkpoint import open_checkpoint  # needs safetensors, which training on its own does not

    checkpoint = open_checkpoint(Path(path))
    state_file = checkpoint.path / "state.json"
    if "config" not in checkpoint.state:
        raise InputError(f"{state_file} holds no configuration; it was not written by ict-fast")
    imported = checkpoint.state.get("imported")
    if isinstance(imported, dict) and isinstance(imported.get("caution"), str):
        from ict_fast.screen import say  # needs rich, which training on its own does not

        say(f"warning: {path} is {imported['caution']}")
    model = ConsistencyModel(from_dict(checkpoint.state["config"], str(state_file)))
    fingerprint = checkpoint.state.get("data_fingerprint")
    model.data_fingerprint = None if fingerprint is None else str(fingerprint)
    try:
        model.network.load_state_dict(checkpoint.tensors(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{checkpoint.path / weights}.safetensors does not fit its network: {reason}"
        ) from None
    return model.to(device).eval().requires_grad_(False)
