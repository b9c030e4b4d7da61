"""How good the images are: distances between sets of images, and what to compare them with."""

from ict_fast.evaluation.chunks import discard_work
from ict_fast.evaluation.distance import DistanceToReference
from ict_fast.evaluation.evaluate import evaluate
from ict_fast.evaluation.features import DigitsFeatures, digits_features
from ict_fast.evaluation.image_distance import FrechetDistance
from ict_fast.evaluation.table import table

__all__ = [
    "DigitsFeatures",
    "DistanceToReference",
    "FrechetDistance",
    "digits_features",
    "discard_work",
    "evaluate",
    "table",
]
