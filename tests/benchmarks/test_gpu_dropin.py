"""benchmarks/gpu_dropin.py at sizes that say nothing about speed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
gpu_dropin: Any = importlib.import_module("gpu_dropin")


def test_every_code_base_is_measured_against_the_drop_in() -> None:
    measurements = gpu_dropin.part_dropin(torch.device("cpu"))
    assert len(measurements) == 4
    for name, measure in measurements.items():
        record = measure()
        json.dumps(record)
        assert record["code_base"] in name
        assert record["blocks_replaced"] == 5
        assert record["norms_left"] == 0
        variants = {"own loss", "drop-in loss", "drop-in loss, group norms replaced"}
        assert record["ms"].keys() == record["times_faster"].keys() == variants
        assert all(len(times) == 1 and times[0] > 0 for times in record["ms_all"].values())
