"""The variants are the published baseline, iCT, and one ingredient at a time between them."""

from __future__ import annotations

import dataclasses

from ict_fast import presets
from ict_fast.ablation import FINDINGS, VARIANTS, configured
from ict_fast.config import Config, differences

BY_NAME = {variant.name: variant for variant in VARIANTS}
INGREDIENTS = (
    {"network.embedding_scale"},
    {"method.teacher"},
    {"method.metric"},
    {"method.curriculum", "method.s0", "method.s1"},
    {"method.indices", "method.weighting"},
)


def _fields(ours: Config, theirs: Config) -> set[str]:
    return {name for name, _, _ in differences(ours, theirs)}


def test_the_baseline_is_the_2023_preset() -> None:
    baseline = configured(presets.get("cifar10"), BY_NAME["ct2023"])
    published = presets.get("cifar10-ct2023")
    assert baseline.method == published.method
    assert baseline.network.embedding_scale == published.network.embedding_scale


def test_each_rung_of_the_ladder_changes_one_ingredient_and_the_last_is_ict() -> None:
    base = presets.get("digits")
    rungs = [configured(base, variant) for variant in VARIANTS if variant.group == "ladder"]
    changed = [_fields(*pair) for pair in zip(rungs, [*rungs[1:], base], strict=True)]
    assert [fields - {"method.teacher_ema"} for fields in changed] == list(INGREDIENTS)


def test_each_variant_of_ict_changes_one_ingredient() -> None:
    base = presets.get("digits")
    single = [*INGREDIENTS, {"method.huber_c"}, {"network.dropout"}]
    for variant in VARIANTS:
        if variant.group in ("ict", "ladder"):
            continue
        fields = _fields(base, configured(base, variant)) - {"method.teacher_ema"}
        assert fields, variant
        assert any(fields <= ingredient for ingredient in single), (variant, fields)


def test_names_are_unique_and_findings_name_variants() -> None:
    assert len(BY_NAME) == len(VARIANTS)
    for finding in FINDINGS:
        assert {finding.better, finding.worse} <= BY_NAME.keys(), finding
        assert finding.better != finding.worse


def test_every_variant_is_valid_for_every_preset_of_ict() -> None:
    for preset in ("digits", "cifar10", "imagenet64"):
        for variant in VARIANTS:
            assert dataclasses.is_dataclass(configured(presets.get(preset), variant))
