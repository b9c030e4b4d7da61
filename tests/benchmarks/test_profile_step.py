"""Where a step's time goes: categories by name, and sums that add up."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
profile_step: Any = importlib.import_module("profile_step")
step_profile: Any = importlib.import_module("step_profile")
categories: Any = importlib.import_module("step_categories")


@pytest.mark.parametrize(
    ("name", "category"),
    [
        (
            "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
            "convolution",
        ),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nt_n_tilesize128x128x8_stage3_cublas", "other matrix products"),
        ("void cudnn::cnn::conv2d_grouped_direct_kernel<false, true>", "convolution"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("resident_forward", "norm"),
        ("triton_red_fused_native_group_norm_convolution_silu_3", "norm"),
        ("triton_poi_fused_add_convolution_7", "elementwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise",
        ),
        ("void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<3>>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<>>", "elementwise"),
        (
            "void at::native::elementwise_kernel<128, 4, silu_backward_kernel(TensorIteratorBase&)>",
            "elementwise",
        ),
        ("void at::native::ComputeInternalGradientsCUDAKernel<c10::BFloat16>(long)", "norm"),
        ("void at::native::GammaBetaBackwardCUDAKernel1<c10::BFloat16>(long)", "norm"),
        ("_backward_kernel", "loss and noise"),
        ("_update_kernel", "optimizer"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "other matrix products"),
        ("_noise_kernel", "loss and noise"),
        ("Memcpy HtoD (Pinned -> Device)", "data"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_group_norm_backward", "norm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_a_name_has_its_category(name: str, category: str) -> None:
    assert categories.category(name) == category


def test_a_profile_goes_by_the_categories_of_now_as_far_as_it_keeps_the_kernels() -> None:
    top = [
        {"name": "silu_backward_kernel", "category": "loss and noise", "ms": 3.0, "calls": 2},
        {"name": "GammaBetaBackwardCUDAKernel1", "category": "elementwise", "ms": 2.0, "calls": 1},
        {"name": "resident_forward", "category": "norm", "ms": 1.0, "calls": 1},
    ]
    kept = {"wall_ms": 20.0, "ms": {"norm": 1.5, "elementwise": 4.0, "loss and noise": 3.5}, "top": top}
    found = step_profile.categorised(kept)
    assert found["ms"] == {"norm": 3.5, "elementwise": 5.0, "loss and noise": 0.5}
    assert kept["ms"]["norm"] == 1.5
    assert step_profile.categorised({"ms": {"norm": 1.0}}) == {"ms": {"norm": 1.0}}


def test_every_kernel_of_ours_has_a_category_by_its_whole_name() -> None:
    counted = json.loads((Path(__file__).parents[2] / "benchmarks/results/step-counts.json").read_text())
    launched = {name for step in counted["steps"] for name in step["kernels"]}
    assert categories.OUR_KERNELS - launched == {"_reduce_kernel"}, "of images that a step has none of"
    assert launched < categories.OUR_KERNELS
    assert categories.category("layer_norm_kernel") != "optimizer"


def test_overlapping_kernels_are_counted_once() -> None:
    assert step_profile.covered([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7
    assert step_profile.covered([]) == 0


def test_a_profile_adds_up_to_the_wall_time_and_leaves_a_trace(tmp_path: Path) -> None:
    *_, record = profile_step.profile_preset(
        "digits", 2, profile_step.torch.device("cpu"), tmp_path, ["ict-fast, uncompiled"]
    )
    (found,) = record["profiles"].values()
    assert sum(found["ms"].values()) == pytest.approx(found["wall_ms"], rel=0.02)
    assert {"convolution", "norm", "elementwise", "optimizer", "data", "idle"} <= found["ms"].keys()
    for each in found["top"]:
        assert 0 <= each["ms"] <= found["ms"][each["category"]] * 1.0001
    with gzip.open(tmp_path / found["trace"]) as file:
        events = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::convolution_backward", "ict-fast: loader"} <= events
    table = profile_step.table_of(record["profiles"])
    assert f"**{found['wall_ms']:.2f}**" in table


def test_the_budget_and_the_memory_bound_a_preset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, seen = [0.0], []

    def profile_variant(name: str, preset: str, images: int, *_: Any) -> dict[str, Any]:
        seen.append((name, images))
        clock[0] += 30.0
        if name == "second" and images > 16:
            raise profile_step.torch.OutOfMemoryError("CUDA out of memory")
        return {"wall_ms": 1.0}

    monkeypatch.setattr(profile_step, "profile_variant", profile_variant)
    monkeypatch.setattr(profile_step.time, "monotonic", lambda: clock[0])
    cpu, names = profile_step.torch.device("cpu"), ["first", "second", "third"]
    *_, record = profile_step.profile_preset("digits", 32, cpu, tmp_path, names, seconds=130.0)
    assert seen == [("first", 32), ("second", 32), ("first", 16), ("second", 16)]
    assert record["batch_size"] == 16
    assert list(record["profiles"]) == ["first", "second"]
    assert list(record["left_out"]) == ["third"]
    assert record["failed"] == {}
