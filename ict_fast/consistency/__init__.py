"""The science of consistency models: preconditioning, curriculum, objective and sampling."""

from ict_fast.consistency.curriculum import Stage, num_scales, stages, teacher_ema_decay
from ict_fast.consistency.editing import colorize, edit, inpaint, stroke, upscale
from ict_fast.consistency.model import ConsistencyModel, load_model
from ict_fast.consistency.objective import ConsistencyObjective
from ict_fast.consistency.sampling import sample, sample_pixels, sampling_sigmas

__all__ = [
    "ConsistencyModel",
    "ConsistencyObjective",
    "Stage",
    "colorize",
    "edit",
    "inpaint",
    "load_model",
    "num_scales",
    "sample",
    "sample_pixels",
    "sampling_sigmas",
    "stages",
    "stroke",
    "teacher_ema_decay",
    "upscale",
]
