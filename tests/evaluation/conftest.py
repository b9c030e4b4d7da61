"""Stand-ins for the published Inception network, which is not ours to ship: TorchScript of its interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ict_fast.evaluation import metrics


@pytest.fixture(scope="session", autouse=True)
def few_subsets() -> Iterator[int]:
    """The kernel distance as a mean over 4 subsets instead of 100, which take 3 s; the number it has else."""
    with pytest.MonkeyPatch.context() as patch:
        number = metrics._KERNEL_SUBSETS
        patch.setattr(metrics, "_KERNEL_SUBSETS", 4)
        yield number


class LikeInception(nn.Module):
    """Features: the pixels, projected. Probabilities of 5 classes, which change with the output's bias."""

    def __init__(self, num_features: int, channels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("projection", torch.randn(channels * 64, num_features, generator=generator) / 8)
        self.register_buffer("output", torch.randn(num_features, 5, generator=generator))
        self.register_buffer("bias", torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0]))

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        assert img.dtype == torch.uint8
        assert img.shape[1] == 3
        pooled = nn.functional.adaptive_avg_pool2d(img.float() / 127.5 - 1, (8, 8))
        features = (pooled.flatten(1) @ self.projection).relu()
        if return_features:
            return features
        logits = features @ self.output
        if not no_output_bias:
            logits = logits + self.bias
        return logits.softmax(1)


class FeaturesAlone(nn.Module):
    """The plainest form: no options, the mean of each channel."""

    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean((2, 3))


class NaNOfBright(FeaturesAlone):
    """NaN for white images only, so that trying it with black ones shows nothing."""

    def forward(self, img: Tensor) -> Tensor:
        means = img.float().mean((2, 3))
        return torch.where(means > 250, torch.full_like(means, float("nan")), means)


class Flat(nn.Module):
    """Not features: one number for all images."""

    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean()


def save_scripted(module: nn.Module, path: Path) -> Path:
    """Writes a module as TorchScript, whose deprecation is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file with the interface of inception-2015-12-05.pt and 16 features."""
    return save_scripted(LikeInception(16), tmp_path_factory.mktemp("features") / "like-inception.pt")


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes one of the other stand-ins, by the name of its class."""
    folder = tmp_path_factory.mktemp("scripted")
    modules = {"FeaturesAlone": FeaturesAlone, "NaNOfBright": NaNOfBright, "Flat": Flat}
    return lambda name: save_scripted(modules[name](), folder / f"{name}.pt")
