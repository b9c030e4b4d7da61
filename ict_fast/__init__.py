"""A fast trainer of improved consistency models (iCT).

Names are imported when first used: `import ict_fast` alone imports neither torch nor anything else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ict_fast.version import __version__

if TYPE_CHECKING:
    from ict_fast import presets
    from ict_fast.config import Config
    from ict_fast.consistency import ConsistencyModel, load_model, sample
    from ict_fast.errors import InputError, TrainingError
    from ict_fast.evaluation import evaluate
    from ict_fast.training.trainer import RunResult, train

_HOME = {
    "Config": "ict_fast.config",
    "ConsistencyModel": "ict_fast.consistency",
    "InputError": "ict_fast.errors",
    "RunResult": "ict_fast.training.trainer",
    "TrainingError": "ict_fast.errors",
    "evaluate": "ict_fast.evaluation",
    "load_model": "ict_fast.consistency",
    "sample": "ict_fast.consistency",
    "train": "ict_fast.training.trainer",
}

__all__ = [
    "Config",
    "ConsistencyModel",
    "InputError",
    "RunResult",
    "TrainingError",
    "__version__",
    "evaluate",
    "load_model",
    "presets",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("ict_fast.presets")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
