"""What turns images into the numbers that sets of images are compared on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError
from ict_fast.evaluation.features import DigitsFeatures, digits_features
from ict_fast.evaluation.reference import Reference
from ict_fast.evaluation.torchscript import open_torchscript

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""inception-2015-12-05.pt: the network of every published FID, as TorchScript; docs/data.md has sources."""
_INCEPTION_FEATURES = 2048


class FeatureNetwork(Protocol):
    """What an evaluation asks of a network; picklable, so that every process can have it."""

    name: str
    """What a result records."""
    sha256: str
    """Of the network: equal for equal features."""
    num_features: int
    batch_size: int
    """Images per forward pass. Fixed: the last bits of a feature may depend on it."""

    def __call__(
        self, images: np.ndarray, device: torch.device, *, probabilities: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and, if asked for and known, probabilities of classes.

        Args:
            images: uint8 (N, H, W, C), C = 1 or 3.
            device: where to compute them.
            probabilities: whether they are wanted.
        Returns:
            float (N, num_features), and float (N, K) or None.
        Raises:
            InputError: features that are not finite.
        """
        ...


class DigitsNetwork:
    """The digits classifier as a FeatureNetwork: on the CPU and in float64, the same everywhere."""

    name = DigitsFeatures.name
    num_features = DigitsFeatures.num_features
    batch_size = 512

    def __init__(self) -> None:
        self._module = digits_features()
        self.accuracy = self._module.accuracy
        weights = [parameter.numpy().tobytes() for parameter in self._module.parameters()]
        self.sha256 = hashlib.sha256(b"".join(weights)).hexdigest()

    def __call__(
        self, images: np.ndarray, device: torch.device, *, probabilities: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        def compute(batch: Tensor) -> tuple[Tensor, Tensor | None]:
            features = self._module(batch)
            return features, self._module.classify(features).softmax(1) if probabilities else None

        return in_batches(images, self.batch_size, compute)


class TorchScriptNetwork:
    """A TorchScript file as a FeatureNetwork.

    The file's `forward` has one of these forms, the second being that of the published Inception network:

    * forward(images) -> features
    * forward(images, return_features: bool, no_output_bias: bool, ...) -> features if return_features is
      true, else probabilities of classes. `no_output_bias`, which may be missing, is set for these, as the
      Inception score is defined without the last layer's bias.

    images: uint8 (N, 3, H, W), grey ones repeated; features: float (N, D); probabilities: float (N, K), each
    row with sum 1.
    """

    batch_size = 64

    def __init__(self, path: Path, sha256: str | None = None, resolution: int = 64) -> None:
        """Loads and tries the file.

        Args:
            path, sha256: see `open_torchscript`.
            resolution: of the images that it is tried with.
        Raises:
            InputError: see `open_torchscript`; or a module of another form, by its first difference.
        """
        self.path = path.absolute()
        self._module: torch.jit.ScriptModule | None = None
        self._device = torch.device("cpu")
        self._module, self.sha256 = open_torchscript(path, sha256)
        self.name = "inception-2015-12-05" if self.sha256 == INCEPTION_SHA256 else path.name
        schema: Any = self._module.forward.schema  # type: ignore[attr-defined]
        self._arguments = {argument.name for argument in schema.arguments}
        images = torch.zeros((2, 3, resolution, resolution), dtype=torch.uint8)
        features = self._run(images, self._features_options())
        if features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
            kind = str(features.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: gives {kind} of shape {tuple(features.shape)} for 2 images; features must be floats"
                " of shape (2, D)"
            )
        self.num_features = features.shape[1]
        if self.has_probabilities:
            self._check_probabilities(self._run(images, self._probability_options()))

    @property
    def has_probabilities(self) -> bool:
        return "return_features" in self._arguments

    def __call__(
        self, images: np.ndarray, device: torch.device, *, probabilities: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if self._module is None:  # in a process that this object was sent to
            self._module, _ = open_torchscript(self.path, self.sha256)
            self._device = torch.device("cpu")
        if device != self._device:
            self._module.to(device)
            self._device = device

        def compute(batch: Tensor) -> tuple[Tensor, Tensor | None]:
            batch = batch.to(device)
            batch = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
            features = self._run(batch, self._features_options())
            if not (probabilities and self.has_probabilities):
                return features, None
            return features, self._run(batch, self._probability_options())

        features, classes = in_batches(images, self.batch_size, compute)
        for what, values in (("features", features), ("probabilities", classes)):
            broken = 0 if values is None else int((~np.isfinite(values)).any(1).sum())
            if broken:
                raise InputError(
                    f"{self.path}: its {what} of {broken} of {len(images)} images are NaN or infinite; such a"
                    " network measures nothing"
                )
        return features, classes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a ScriptModule cannot be sent; the file is read again

    def _features_options(self) -> dict[str, bool]:
        return {"return_features": True} if self.has_probabilities else {}

    def _probability_options(self) -> dict[str, bool]:
        return {"no_output_bias": True} if "no_output_bias" in self._arguments else {}

    def _run(self, images: Tensor, options: dict[str, bool]) -> Tensor:
        assert self._module is not None
        try:
            with torch.no_grad():
                result = self._module(images, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise InputError(
                f"{self.path}: fails on uint8 images of shape {tuple(images.shape)}: {lines[-1][:200]}"
            ) from error
        if not isinstance(result, Tensor):
            raise InputError(f"{self.path}: gives a {type(result).__name__}, not a tensor")
        return result

    def _check_probabilities(self, classes: Tensor) -> None:
        right = classes.ndim == 2 and len(classes) == 2 and classes.is_floating_point()
        if not right or not torch.allclose(classes.sum(1), torch.ones_like(classes[:, 0]), atol=1e-3):
            raise InputError(
                f"{self.path}: without return_features it must give probabilities of classes, (N, K) with"
                f" rows of sum 1; it gives shape {tuple(classes.shape)}"
            )


def choose_network(
    reference: Reference, resolution: int, features: Path | None, sha256: str | None
) -> FeatureNetwork:
    """The network that a reference is looked at with.

    Args:
        reference: what is compared with.
        resolution: of the images.
        features: a TorchScript file, see `TorchScriptNetwork`; None for the digits classifier.
        sha256: what the file's SHA-256 must be; None to accept any.
    Raises:
        InputError: no file, and a SHA-256 of one, or a reference that does not hold digits; or statistics of
            another network.
    """
    if features is None and sha256 is not None:
        raise InputError(
            f"features_sha256 is {sha256}, and no file of features is given; name it, or neither"
        )
    network: FeatureNetwork
    if features is None:
        _require_digits(reference)
        network = DigitsNetwork()
    else:
        network = TorchScriptNetwork(features, sha256, resolution)
    if reference.statistics is not None:
        _require_size(network, len(reference.statistics.mean), str(reference.path))
    return network


def _require_digits(reference: Reference) -> None:
    """Raises InputError unless the reference's images are digits, for which there are features here."""
    known = {image.tobytes() for image in load_digits()[0]}
    if reference.images is not None and all(image.tobytes() in known for image in reference.images.array):
        return
    held = "statistics" if reference.images is None else "other images"
    raise InputError(
        f"{reference.path}: holds {held}, and without --features there are features for scikit-learn's digits"
        " only; --features takes Inception as TorchScript (docs/evaluation.md says where it is published),"
        " `ict-fast prepare digits` makes a store of digits"
    )


def _require_size(network: FeatureNetwork, num_features: int, name: str) -> None:
    """Raises InputError unless statistics of `num_features`, of the file `name`, fit the network."""
    if num_features != network.num_features:
        hint = "; published statistics need --features inception-2015-12-05.pt"
        raise InputError(
            f"{name}: statistics of {num_features:,} features, and {network.name} gives"
            f" {network.num_features:,}{hint if num_features == _INCEPTION_FEATURES else ''}"
        )


def in_batches(
    images: np.ndarray, batch_size: int, compute: Callable[[Tensor], tuple[Tensor, Tensor | None]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and probabilities of uint8 (N, H, W, C), computed from uint8 (n, C, H, W) at a time."""
    features, classes = [], []
    with torch.no_grad():
        for first in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[first : first + batch_size])).permute(0, 3, 1, 2)
            values, probabilities = compute(batch)
            features.append(values.cpu().numpy())
            if probabilities is not None:
                classes.append(probabilities.cpu().numpy())
    return np.concatenate(features), np.concatenate(classes) if classes else None
