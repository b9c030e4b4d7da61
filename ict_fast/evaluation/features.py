"""What two sets of digits are compared on: the activations of a small classifier of handwritten digits.

The Fréchet distance of the literature compares features of an Inception network that was trained on ImageNet;
for 8x8 digits a classifier of digits takes its place. It trains in seconds from nothing but scikit-learn's
bundled images, in float64 and from its own generator, so that the distances are the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError

NUM_FEATURES = 64
RESOLUTION = 8
HELD_OUT = 360  # a fifth of the 1,797 digits, never trained on
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 15, 64, 3e-3, 1e-2
SEED = 0


class DigitsFeatures(nn.Module):
    """A classifier of 8x8 digits whose last hidden layer is the feature vector; float64 throughout.

    Has the interface that torchmetrics' metrics ask of a feature module: `num_features`, uint8 images in.
    The weights are unset: `digits_features` returns a trained one.

    Attributes:
        name: what an evaluation records as its features.
        accuracy: on the held-out digits, in [0, 1].
    """

    name = "digits-classifier-v1"
    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = 0.0
        # skip_init: the default initialisation would draw from torch's global generator.
        self.conv1 = nn.utils.skip_init(nn.Conv2d, 1, 16, 3, padding=1, dtype=torch.float64)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, 16, 32, 3, stride=2, padding=1, dtype=torch.float64)
        self.hidden = nn.utils.skip_init(nn.Linear, 32 * 4 * 4, NUM_FEATURES, dtype=torch.float64)
        self.classify = nn.utils.skip_init(nn.Linear, NUM_FEATURES, 10, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        """The features of a batch.

        Args:
            images: (N, 1, 8, 8) uint8.
        Returns:
            (N, 64) float64.
        Raises:
            InputError: on images of another shape or type.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (1, RESOLUTION, RESOLUTION):
            raise InputError(
                f"the digits features take uint8 images of shape (N, 1, 8, 8);"
                f" these are {str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
            )
        # SiLU, not ReLU: no feature is dead on a whole set, so covariances stay regular.
        x = F.silu(self.conv1(images.double() / 127.5 - 1))
        x = F.silu(self.conv2(x))
        return F.silu(self.hidden(x.flatten(1)))


@functools.cache
def digits_features() -> DigitsFeatures:
    """The trained feature extractor: the same weights in every process; about 3 s for the first call.

    Leaves torch's global generator as it was, and holds torch to one thread while it trains.

    Returns:
        a module in evaluation mode without gradients, on the CPU.
    """
    # Tensors made in inference mode cannot be trained on; whoever evaluates may be in it.
    with torch.inference_mode(False), torch.enable_grad(), _one_thread():
        images_nhwc, labels = load_digits()
        images, targets = torch.from_numpy(images_nhwc).permute(0, 3, 1, 2), torch.from_numpy(labels)
        generator = torch.Generator().manual_seed(SEED)
        order = torch.randperm(len(images), generator=generator)
        held_out, training = order[:HELD_OUT], order[HELD_OUT:]

        features = DigitsFeatures()
        _initialise(features, generator)
        _train(features, images[training], targets[training], generator)
        features.eval().requires_grad_(False)
        predicted = features.classify(features(images[held_out])).argmax(1)
        features.accuracy = float((predicted == targets[held_out]).double().mean())
    return features


def _initialise(features: DigitsFeatures, generator: torch.Generator) -> None:
    """He's uniform initialisation, drawn from `generator`; biases zero."""
    for layer in features.children():
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.bias is not None
        nn.init.kaiming_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)


def _train(features: DigitsFeatures, images: Tensor, targets: Tensor, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(features.parameters(), weight_decay=WEIGHT_DECAY)
    batches = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for index in order[: batches * BATCH_SIZE].split(BATCH_SIZE):
            logits = features.classify(features(images[index]))
            optimizer.zero_grad()
            F.cross_entropy(logits, targets[index]).backward()
            optimizer.step()
            schedule.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order: more threads would round differently, and be slower on batches this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
