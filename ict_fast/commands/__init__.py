"""The commands of `ict-fast`, a file each: its options, and `run`, which takes them and returns an exit code.

torch is imported inside the functions only: what can be refused without it is refused at once.
"""

from collections.abc import Callable
from typing import Any

from ict_fast.commands import doctor, ema, evaluate, prepare, sample, train

COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (train.TrainOptions, train.run),
    "sample": (sample.SampleOptions, sample.run),
    "evaluate": (evaluate.EvaluateOptions, evaluate.run),
    "ema": (ema.EmaOptions, ema.run),
    "prepare": (prepare.PrepareOptions, prepare.run),
    "doctor": (doctor.DoctorOptions, doctor.run),
}
