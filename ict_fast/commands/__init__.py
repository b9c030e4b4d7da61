"""The commands of `ict-fast`, a file each: its options, and `run`, which takes them and returns an exit code.

torch is imported inside the functions only: what can be refused without it is refused at once.
"""

from collections.abc import Callable
from typing import Any

from ict_fast.commands import (
    ablate,
    doctor,
    edit,
    ema,
    evaluate,
    export,
    import_weights,
    plan,
    prepare,
    report,
    sample,
    search_sigma,
    train,
)

COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (train.TrainOptions, train.run),
    "sample": (sample.SampleOptions, sample.run),
    "evaluate": (evaluate.EvaluateOptions, evaluate.run),
    "report": (report.ReportOptions, report.run),
    "ablate": (ablate.AblateOptions, ablate.run),
    "prepare": (prepare.PrepareOptions, prepare.run),
    "import": (import_weights.ImportOptions, import_weights.run),
    "export": (export.ExportOptions, export.run),
    "edit": (edit.EditOptions, edit.run),
    "search-sigma": (search_sigma.SearchSigmaOptions, search_sigma.run),
    "ema": (ema.EmaOptions, ema.run),
    "plan": (plan.PlanOptions, plan.run),
    "doctor": (doctor.DoctorOptions, doctor.run),
}
