"""What a measurement's numbers depend on beside its options: kept with them, to tell two of them apart."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from ict_fast.consistency import ConsistencyModel
from ict_fast.evaluation.chunks import weights_sha256
from ict_fast.evaluation.feature_networks import DigitsNetwork, FeatureNetwork, TorchScriptNetwork
from ict_fast.evaluation.reference import Reference
from ict_fast.version import __version__


def provenance(
    model: ConsistencyModel, reference: Reference, network: FeatureNetwork, device: torch.device
) -> dict[str, Any]:
    """The weights, the features, the reference, the device and the versions, as JSON values.

    Args:
        model, reference, network: what is measured, what it is compared with, and the features of both.
        device: where the images are made.
    Returns:
        features (name, sha256, num_features, accuracy or path), model_sha256, reference_path,
        reference_fingerprint, device (cpu or the GPU's name) and versions.
    """
    return {
        "features": _about(network),
        "model_sha256": weights_sha256(model),
        "reference_path": str(reference.path),
        "reference_fingerprint": reference.fingerprint,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "ict_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchmetrics", "numpy", "scikit-learn")},
        },
    }


def _about(network: FeatureNetwork) -> dict[str, Any]:
    accuracy = {"accuracy": network.accuracy} if isinstance(network, DigitsNetwork) else {}
    path = {"path": str(network.path)} if isinstance(network, TorchScriptNetwork) else {}
    about = {"name": network.name, **accuracy, **path, "num_features": network.num_features}
    return {**about, "sha256": network.sha256}
