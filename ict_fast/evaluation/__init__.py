"""How good the images are: distances between sets of images, and what to compare them with."""

from ict_fast.evaluation.evaluate import evaluate, table
from ict_fast.evaluation.features import DigitsFeatures, digits_features
from ict_fast.evaluation.metrics import FrechetDistance

__all__ = ["DigitsFeatures", "FrechetDistance", "digits_features", "evaluate", "table"]
