"""Launches on their way to a GPU: Triton's own binding and specialising of every kernel's arguments.

Neither the interpreter nor the ahead-of-time build goes this way. Here a stand-in tells Triton that an H100
is there, and a hook keeps what Triton is about to compile, and stops it: no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import compiled_kernels
import triton
from kernel_cases import cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compiler as triton_compiler

from ict_kernels import RAdamEMA, triton_support
from ict_kernels.consistency_loss import launch_loss, launch_loss_backward
from ict_kernels.fir_resampling import launch_down, launch_up
from ict_kernels.group_norm_plan import plan_of, planned
from ict_kernels.noise_levels import launch_levels
from ict_kernels.noising import launch_noise
from ict_kernels.philox import DROPOUT
from ict_kernels.triton_support import Launch, launch, record_launches

ROOT = Path(__file__).parents[2]
norm: Any = sys.modules["ict_kernels.group_norm_silu"]  # the function has its module's name

H100 = GPUTarget("cuda", 90, 32)
DEVICE = "no device"  # Triton caches kernels by device: these stay apart from those of a GPU
Send = Callable[[Launch], dict[str, Any]]


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Iterator[Send]:
    """Makes a launch as on a GPU, up to the compiler; gives what that would be asked to compile."""
    driver = SimpleNamespace(
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: H100,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    asked: list[dict[str, Any]] = []

    def stop_before_compiling(*, compile: dict[str, Any], **_: Any) -> bool:
        asked.append(compile)
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", stop_before_compiling)
    kernels = []

    def sent(each: Launch) -> dict[str, Any]:
        kernels.append(each.kernel)
        launch(each.kernel, each.grid, num_warps=each.num_warps, maxnreg=each.maxnreg, **each.arguments)
        return asked.pop()

    yield sent
    triton.runtime.driver.set_active(before)
    for kernel in kernels:
        kernel.device_caches.pop(DEVICE, None)


@pytest.mark.parametrize("target", [H100, GPUTarget("hip", "gfx942", 64)], ids=lambda target: target.backend)
def test_a_limit_of_registers_is_for_nvidia_alone(
    send: Send, monkeypatch: pytest.MonkeyPatch, target: GPUTarget
) -> None:
    """Triton's backend for AMD refuses the word."""
    amd = target.backend == "hip"
    monkeypatch.setattr(triton.runtime.driver.active, "get_current_target", lambda: target)
    monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
    limited = [each for case in cases(full=False) for each in case.launches if each.maxnreg is not None]
    assert limited
    for each in limited:
        assert ('"maxnreg"' in send(each)["specialization_data"]) is not amd


def ir_of(each: Launch, asked: dict[str, Any]) -> str:
    """The first stage of compiling it, in which Triton runs the kernel's Python: types are found out here."""
    backend = triton_compiler.make_backend(H100)
    options = backend.parse_options({"num_warps": each.num_warps})
    context = triton_compiler.ir.context()
    triton_compiler.ir.load_dialects(context)
    backend.load_dialects(context)
    [attributes] = asked["configs"]
    source = ASTSource(each.kernel, asked["signature"], asked["constants"], attributes)
    implementation = backend.get_codegen_implementation(options)
    return str(source.make_ir(H100, options, implementation, backend.get_module_map(), context))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def kernel_named(path: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"sent_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_every_launch_of_every_case_binds_as_the_table_of_compiled_kernels_says(send: Send) -> None:
    reached = set()
    for case in cases(full=True):
        for each in case.launches:
            asked = send(each)
            reached.add(each.kernel.__name__)
            signature, constants, attributes = compiled_kernels.specialised(each, "fp32")
            assert asked["signature"] == signature, (case.op, case.shape, each.kernel)
            assert asked["constants"] == constants, (case.op, case.shape, each.kernel)
            assert {at: value for at, value in asked["configs"][0].items() if value} == attributes
            assert asked["num_warps"] == each.num_warps
    files = (ROOT / "kernels/ict_kernels").glob("*.py")
    asks = re.compile(r"\blaunch\(\s*(\w+),")
    launched = {name for file in files for name in asks.findall(file.read_text())}
    assert reached == launched


def edge_launches() -> list[Launch]:
    """Of single values: each size, stride and count that is 1 becomes a constant, which has no `.to`."""
    bf16 = torch.bfloat16
    with record_launches() as launches:
        for count, channels, height, width in ((1, 1, 1, 1), (1, 1, 301, 299), (1, 40_000, 1, 1)):
            x = empty(count, channels, height, width, dtype=bf16)
            weight, scale = empty(channels), empty(count, channels)
            tensors = (1, weight, weight, scale, scale, scale, integers(2), integers())
            numbers = (1, DROPOUT << 16 | 1, 1)
            norm._forward(x, *tensors, *numbers, 1e-5, True)
            norm._backward(x, x, empty(count, 1, 2), *tensors, *numbers, True, [True] * 5)
        # A convolution's bias has no row of its own for each sample; an offset may need 64 bits.
        x, bias = empty(2, 36, 3, 3, dtype=torch.float16), empty(36)
        norm._forward(x, 2, bias, None, None, None, bias, integers(2), None, 2**40, 5, 7, 1e-5, False)

        for shape in ((1, 1, 1, 1), (1, 1, 130, 1000)):
            images = [empty(*shape, dtype=bf16)] * 2 + [empty(*shape)] * 2 + [empty(shape[0])] * 3
            scalars = (1.0, 0.002, 0.03, "pseudo-huber")
            *_, difference = launch_loss(*images, *scalars, True)
            launch_loss(*images, *scalars, False)
            student, *_, sigma_next, _, weight = images
            launch_loss_backward(empty(1), student, difference, sigma_next, weight, empty(1), *scalars)

        one = empty(1)
        launch_noise(empty(1, 1, 1, 1, dtype=torch.uint8), one, one, None, integers(2), None, 1, 0.5)
        launch_noise(empty(1, 1, 1, 1), one, one, empty(1, dtype=torch.bool), integers(2), None, 2**40, 0.5)
        launch_levels(None, integers(1), integers(1, 0), empty(1, 2), one[None], integers(2), None, 1, 1)

        p = nn.Parameter(empty(1))
        optimizer = RAdamEMA([p], lr=1.0, weight_decay=1.0)
        p.grad = empty(1)
        with torch.no_grad():
            optimizer._step_by_kernels([(optimizer.param_groups[0], [p])], [True])
        launch_down(empty(1, 1, 2, 2), 1.0)
        launch_up(empty(1, 1, 1, 1), 1.0)
    words, drawn = integers(1, 4), empty(1, 4)
    philox = kernel_named("tests/kernels/interpreted/interpreted_philox.py", "draw_kernel")
    launches.append(
        Launch(
            philox,
            (1,),
            {
                "seed_ptr": integers(2),
                "words_ptr": words,
                "lanes_ptr": empty(1, 8, dtype=torch.int32),
                "normal_ptr": drawn,
                "philox_stream": 1,
                "offset": 1,
                "CALLS": 1,
            },
        )
    )
    for path in ("tests/kernels/interpreted/interpreted_philox.py", "tests/gpu/test_noising.py"):
        kernel = kernel_named(path, "normal_kernel")
        launches.append(Launch(kernel, (1,), {"words_ptr": words, "normal_ptr": drawn, "CALLS": 1}))
    return launches


def test_every_kernel_has_types_for_what_triton_makes_of_its_arguments(send: Send) -> None:
    few = [each for case in cases(full=False) for each in case.launches]
    for each in few + edge_launches():
        assert "tt.func public" in ir_of(each, send(each)), each


def test_no_value_of_a_schedule_asks_radam_for_other_machine_code(send: Send) -> None:
    """Of the bits of 1.0 16 is a divisor, of those of 0.1 not; those of 0.0 would fit into 32."""
    p = nn.Parameter(empty(1))
    p.grad = empty(1)
    optimizer = RAdamEMA([p], lr=1e-4)
    [group] = optimizer.param_groups
    asked = []
    for lr, decay, beta1 in ((1e-4, 0.9999, 0.9), (0.1, 0.5, 0.95), (1.0, 1.0, 0.0), (0.0, 0.0, 0.5)):
        group |= {"lr": lr, "ema_decay": decay, "betas": (beta1, 0.999)}
        with record_launches() as launches, torch.no_grad():
            optimizer._step_by_kernels([(group, [p])], [True])
        [scalars] = (each for each in launches if each.kernel.__name__ == "_scalars_kernel")
        found = send(scalars)
        asked.append([found[key] for key in ("signature", "constants", "configs")])
        assert {name: kind for name, kind in found["signature"].items() if name.endswith("_bits")} == (
            dict.fromkeys(("lr_bits", "decay_bits", "beta1_bits", "beta2_bits"), "i64")
            | {"max_norm_bits": "constexpr"}  # None
        )
    assert all(each == asked[0] for each in asked)


def test_a_kernel_that_a_launch_reaches_is_compiled_with_its_limit_of_registers_and_fused(send: Send) -> None:
    [each] = next(iter(cases(full=False))).launches
    asked = send(Launch(each.kernel, each.grid, each.arguments, num_warps=8, maxnreg=128))
    assert '"maxnreg": 128' in asked["specialization_data"]
    assert '"enable_fp_fusion": true' in asked["specialization_data"]
    assert asked["num_warps"] == 8


def test_the_name_of_an_option_of_triton_would_be_found(send: Send) -> None:
    """What this file is for: nothing before the first launch on a GPU refuses a parameter called `stream`."""
    [each] = next(iter(cases(full=False))).launches
    with pytest.raises(AssertionError, match="stream option is deprecated"):
        send(Launch(each.kernel, each.grid, {**each.arguments, "stream": 0}))


def test_launches_after_the_first_go_to_what_triton_compiled_with_the_arguments_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled for real, and launched by a stand-in that keeps what it gets."""
    got: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any):
            self.kernel = source.fn

        def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            assert stream == 77
            names = self.kernel.arg_names  # the arguments are the last that a launcher is given
            got.append((self.kernel.__name__, (x, y, z), dict(zip(names, rest[-len(names) :], strict=True))))

    driver = SimpleNamespace(
        get_current_device=lambda: DEVICE,
        get_current_stream=lambda device: 77,
        get_current_target=lambda: H100,
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=lambda *_: (None, None, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 2**17, "multiprocessor_count": 132},
        ),
    )
    monkeypatch.setattr(triton_support, "_known", {})
    made = []
    run = triton.runtime.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.JITFunction, "run", lambda self, *a, **k: (made.append(self), run(self, *a, **k))[1]
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    x = torch.empty(5, 64, 9, 9).to(memory_format=torch.channels_last)
    weight, stats = torch.empty(64), torch.empty(5, 8, 2)
    none = (None,) * 5
    last = (0, 0, 0, True, [True, True, False, False, False])
    try:
        with planned(resident=False, chunk_bytes=2 * x[0].numel() * 4):
            norm._forward(x, 8, weight, weight, *none, 0, 0, 0, 1e-5, True)
            norm._backward(x, x, stats, 8, weight, weight, *none, *last)
            first = len(made)
            norm._forward(x, 8, weight, weight, *none, 0, 0, 0, 1e-5, True)
            assert len(made) == first, "a second call of the op has nothing to bind"
            with record_launches() as wanted:
                norm._forward(x, 8, weight, weight, *none, 0, 0, 0, 1e-5, True)
                norm._backward(x, x, stats, 8, weight, weight, *none, *last)
                norm._forward(x, 8, weight, weight, *none, 0, 0, 0, 1e-5, True)
    finally:
        triton.runtime.driver.set_active(before)
        for kernel in made:
            kernel.device_caches.pop(DEVICE, None)

    assert len(got) == len(wanted) > len(made)
    for (name, grid, arguments), each in zip(got, wanted, strict=True):
        assert (name, grid[: len(each.grid)]) == (each.kernel.__name__, each.grid)
        for key, value in arguments.items():
            other = each.arguments[key]
            if isinstance(value, Tensor):  # those of the two calls lie elsewhere
                assert (value.shape, value.dtype) == (other.shape, other.dtype)
            else:
                assert value == other, (name, key)


def norm_calls() -> Iterator[Callable[[], object]]:
    """Norms that differ from the first in one thing each: what may, and what may not, share machine code."""

    def odd(t: Tensor) -> Tensor:
        """The same values at an address that 16 does not divide."""
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)

    def image(
        count: int = 2, channels: int = 32, size: int = 4, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        return torch.zeros(count, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)

    vector, rows, seed = torch.zeros(32), torch.zeros(2, 32), torch.zeros(2, dtype=torch.int64)
    usual: dict[str, Any] = {
        "x": image(),
        "groups": 8,
        "weight": vector,
        "bias": vector,
        "scale": None,
        "shift": None,
        "pre_bias": None,
        "seed": None,
        "offset_tensor": None,
        "offset": 0,
        "stream": 0,
        "threshold": 0,
        "silu": True,
        "wanted": [True, True, False, False, False],
        "dy": None,
        "stats": None,
    }
    drawing = {"seed": seed, "threshold": 7, "stream": 5}
    by_embedding = {"scale": rows, "shift": rows, "wanted": [True] * 4 + [False]}
    halves = torch.zeros(2, 80).chunk(2, 1)
    for change in (
        {},
        {"x": image(), "weight": torch.ones(32)},
        {"x": odd(image())},
        {"x": image(dtype=torch.float32)},
        {"x": image(count=3)},
        {"x": image(size=8)},
        {"x": image(size=9)},
        {"x": image(size=10)},
        {"dy": odd(image())},
        {"stats": odd(torch.zeros(2, 8, 2))},
        {"x": image(channels=40), "weight": None, "bias": None, "wanted": [False] * 5},
        {"groups": 4},
        {"weight": odd(vector)},
        {"weight": vector.half()},
        {"weight": None, "wanted": [False, True, False, False, False]},
        {"silu": False},
        drawing,
        {**drawing, "seed": odd(seed)},
        {**drawing, "offset": 9, "threshold": 16, "stream": 48},
        {**drawing, "offset": 2**40},
        {**drawing, "stream": 2**31 + 5},
        {**drawing, "offset_tensor": torch.zeros((), dtype=torch.int64)},
        by_embedding,
        {**by_embedding, "wanted": [True, True, True, False, False]},
        {
            **by_embedding,
            "x": image(channels=40),
            "weight": torch.zeros(40),
            "bias": torch.zeros(40),
            "scale": halves[0],
            "shift": halves[1],
        },
        {**by_embedding, "scale": odd(rows)},
        {**by_embedding, "scale": torch.zeros(2, 40)[:, :32]},
        {"pre_bias": vector, "wanted": [True, True, False, False, True]},
        {"pre_bias": rows, "wanted": [True, True, False, False, True]},
        {"pre_bias": rows[:1].expand(2, 32), "wanted": [True, True, False, False, True]},
    ):
        given = usual | change

        def call(given: dict[str, Any] = given) -> None:
            x, *tensors = list(given.values())[:9]
            numbers = given["offset"], given["stream"], given["threshold"]
            norm._forward(x, *tensors, *numbers, 1e-5, given["silu"])
            stats, dy = given["stats"], given["dy"]
            stats = torch.zeros(len(x), given["groups"], 2) if stats is None else stats
            dy = torch.zeros_like(x) if dy is None else dy
            norm._backward(dy, x, stats, *tensors, *numbers, given["silu"], given["wanted"])

        yield call


def test_launches_that_are_said_to_be_alike_are_compiled_alike(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are compiled alike are found again, but for what is told apart needlessly."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda *, compile, **_: asked.append(compile) or True
    )
    compiled_for: dict[Any, set[str]] = {}
    kernels = set()

    def noted(kernel: Any, grid: tuple[int, ...], *, like: Any, **others: Any) -> None:
        assert like is not None
        kernels.add(kernel)
        launch(kernel, grid, **others)
        of_this = asked.pop()
        seen = [of_this[key] for key in ("signature", "constants", "configs", "num_warps")]
        seen.append(others.get("maxnreg"))
        compiled_for.setdefault((kernel.__name__, like), set()).add(repr(seen))

    monkeypatch.setattr(norm, "launch", noted)
    calls = list(norm_calls())
    for wishes in (
        {"resident": True},
        {"resident": True, "num_warps": 2},
        {"resident": True, "maxnreg": 96},
        {"resident": False},
        {"resident": False, "rows": 8},
    ):
        with planned(**wishes):
            for call in calls:
                call()
            alike = len(compiled_for)
            for call in calls[:2]:
                call()
            assert len(compiled_for) == alike, "other values in the same places are the same launch"
    for kernel in kernels:
        kernel.device_caches.pop(DEVICE, None)
    assert len(kernels) == 8
    assert all(len(each) == 1 for each in compiled_for.values())
    assert len(compiled_for) > 400


def test_launches_on_two_devices_are_never_alike() -> None:
    plan = plan_of(2, 32, 16, 8, 2, False)
    there = torch.zeros(2, 32, 4, 4, device="meta")
    assert norm._like((torch.zeros(2, 32, 4, 4),), (), plan) != norm._like((there,), (), plan)
