"""The variants are the published baseline, iCT, and one ingredient at a time between them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from ict_fast import presets
from ict_fast.ablation.findings import findings_of
from ict_fast.ablation.variants import (
    GROUPS,
    SHORTER_TEACHERS,
    configured,
    default_huber_c,
    preset_names,
    teacher_reach,
    variants_of,
)
from ict_fast.config import Config, MethodConfig, differences
from ict_fast.consistency import teacher_ema_decay
from ict_fast.errors import InputError

NETWORK = ({"network.embedding_scale"}, {"network.dropout"})
METHOD = (
    {"method.teacher"},
    {"method.metric"},
    {"method.curriculum", "method.s0", "method.s1"},
    {"method.indices", "method.weighting"},
)
RUNGS = {
    "digits": [NETWORK[0], *METHOD],
    "cifar10": [*NETWORK, *METHOD],
    "cifar10-deep": [*NETWORK, *METHOD],
    "imagenet64": [NETWORK[1], *METHOD],
    "imagenet64-deep": [NETWORK[1], *METHOD],
}
COMPANIONS = {
    "cifar10": "cifar10-ct2023",
    "cifar10-deep": "cifar10-ct2023",
    "imagenet64": "imagenet64-ct2023",
    "imagenet64-deep": "imagenet64-ct2023",
}
every_preset = pytest.mark.parametrize("preset", list(RUNGS))


def _all(preset: str) -> dict[str, Config]:
    base = presets.get(preset)
    return {variant.name: configured(base, variant) for variant in variants_of(base)}


def _fields(ours: Config, theirs: Config) -> set[str]:
    return {name for name, _, _ in differences(ours, theirs)}


def test_every_preset_of_ict_and_no_other_can_be_varied() -> None:
    assert preset_names() == list(RUNGS)
    for name in set(presets.names()) - RUNGS.keys():
        assert presets.get(name).method.teacher == "ema"
        with pytest.raises(InputError, match=f"--preset is {name}, which is not iCT"):
            variants_of(presets.get(name))


@every_preset
def test_no_two_variants_are_the_same_run(preset: str) -> None:
    found = _all(preset)
    assert len(found) == len(variants_of(presets.get(preset))), "names are unique"
    for (ours, first), (theirs, second) in itertools.combinations(found.items(), 2):
        assert differences(first, second), (ours, theirs)


@every_preset
def test_no_variant_changes_what_the_network_does_not_use(preset: str) -> None:
    for name, config in _all(preset).items():
        fields = _fields(presets.get(preset), config)
        assert config.network.embedding == "fourier" or "network.embedding_scale" not in fields, name


@pytest.mark.parametrize("preset", list(COMPANIONS))
def test_the_baseline_is_the_2023_preset(preset: str) -> None:
    baseline, published = _all(preset)["ct2023"], presets.get(COMPANIONS[preset])
    # All that is trained with but for the paper's divisor in mu(k); the second step's level is the preset's.
    differing = {field for field in _fields(baseline, published) if field.startswith("method.")}
    assert differing == {"method.teacher_ema_divisor"}
    assert baseline.network.dropout == published.network.dropout == 0
    assert baseline.network.embedding == published.network.embedding
    if baseline.network.embedding == "fourier":
        assert baseline.network.embedding_scale == published.network.embedding_scale


def test_the_digits_baseline_is_cifar10s() -> None:
    baseline, published = _all("digits")["ct2023"].method, presets.get("cifar10-ct2023").method
    assert replace(baseline, teacher_ema_divisor="pairs") == published


@every_preset
def test_each_rung_of_the_ladder_changes_one_ingredient_and_the_last_is_ict(preset: str) -> None:
    base = presets.get(preset)
    rungs = [configured(base, variant) for variant in variants_of(base) if variant.group == "ladder"]
    changed = [_fields(*pair) for pair in zip(rungs, [*rungs[1:], base], strict=True)]
    assert [fields - {"method.teacher_ema"} for fields in changed] == RUNGS[preset]


@every_preset
def test_each_variant_of_ict_changes_one_ingredient(preset: str) -> None:
    base = presets.get(preset)
    single = [*NETWORK, *METHOD, {"method.huber_c"}]
    for variant in variants_of(base):
        if variant.group in ("ict", "ladder"):
            continue
        fields = _fields(base, configured(base, variant)) - {"method.teacher_ema"}
        if variant.group == "learning-rate":
            assert "optimizer.lr" in fields
            fields -= {"optimizer.lr", "method.teacher"}
        else:
            assert fields, variant
        assert any(fields <= ingredient for ingredient in single), (variant, fields)


@every_preset
def test_a_claim_compares_two_runs_that_differ_in_what_it_names(preset: str) -> None:
    found, claims = _all(preset), findings_of(presets.get(preset))
    for claim in claims:
        fields = _fields(found[claim.better], found[claim.worse])
        assert fields, claim
        for word, field in (("Dropout", "network.dropout"), ("Fourier", "network.embedding_scale")):
            if claim.claim.startswith(word):
                assert fields == {field}, claim
        if claim.claim.startswith("Dropout"):
            assert found[claim.better].network.dropout > found[claim.worse].network.dropout == 0
        if claim.claim.startswith("No EMA"):
            assert fields == {"method.teacher", "method.teacher_ema"} or fields == {"method.teacher"}
    assert len({claim.claim for claim in claims}) == len(claims), "each is spelled out"


@every_preset
def test_the_required_orderings_are_there(preset: str) -> None:
    required = {(c.better, c.worse, c.factor) for c in findings_of(presets.get(preset)) if c.required}
    before_no_ema = {"digits": "ct2023-fourier"}.get(preset, "ct2023-dropout")
    assert required == {
        ("ict", "ema-teacher", 1),
        ("ct2023-no-ema", before_no_ema, 1),
        ("ict", "ct2023-curriculum", 1),
        ("ict", "fixed-11", 1),
        ("ict", "fixed-1281", 1),
        ("ict", "ct2023", 2),
        ("ict", "ct2023-no-ema", 2),
    }
    uniform = _all(preset)["ct2023-curriculum"].method
    assert (uniform.indices, uniform.weighting) == ("uniform", "uniform")


def test_every_group_has_a_title_and_digits_have_all_but_none() -> None:
    assert {variant.group for variant in variants_of(presets.get("digits"))} == GROUPS.keys()


def test_the_control_lowers_the_rate_of_ict_and_of_its_fastest_teacher() -> None:
    found = _all("digits")
    ict, teacher = found["ict-lr-0.0005"], found["ema-teacher-0.01-lr-0.0005"]
    assert ict.optimizer.lr == teacher.optimizer.lr == 5e-4 < presets.get("digits").optimizer.lr
    assert _fields(ict, teacher) == {"method.teacher", "method.teacher_ema"}
    assert _fields(found["ema-teacher-0.01"], teacher) == {"optimizer.lr"}
    assert teacher.method.teacher_ema == min(SHORTER_TEACHERS)


def test_a_teachers_reach_is_the_mean_age_of_what_it_averages() -> None:
    method = MethodConfig(teacher="ema", teacher_ema=0.9)
    mu = teacher_ema_decay(1281, method)
    ages = sum(age * (1 - mu) * mu**age for age in range(60_000))
    assert teacher_reach(method, 1281) == pytest.approx(ages, rel=0.001)


def test_the_papers_c_is_left_out_of_the_c_to_try() -> None:
    cifar10 = presets.get("cifar10")
    assert default_huber_c(cifar10) == pytest.approx(0.00054 * math.sqrt(3 * 32 * 32))
    assert "huber-0.03" not in _all("cifar10")
    assert "huber-0.03" in _all("digits")
