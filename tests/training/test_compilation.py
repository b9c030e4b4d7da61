"""The compiled step is the eager one, and is compiled once."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import ForkedPython
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._python_dispatch import TorchDispatchMode

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.loaders import Batch
from ict_fast.networks import UNet
from ict_fast.networks.layers import ResidualBlock
from ict_fast.training import compilation
from ict_fast.training.compilation import cache_folder, compile_blocks, compiles
from ict_fast.training.precision import measure_rounding
from ict_fast.training.step import TrainStep
from ict_fast.version import __version__


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled yet, and the settings of this process as they were afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture
def few_blocks(one_level: Config) -> Config:
    """Five blocks at one resolution, with attention, dropout and classes; two micro-batches."""
    network = replace(one_level.network, num_classes=10)
    return replace(one_level, network=network, training=replace(one_level.training, micro_batch=8))


def _trained(config: Config, compile: str, batches: Callable, size: int = 8) -> Iterator[TrainStep]:
    """After each step, of micro-batches of this size."""
    step = TrainStep(replace(config, training=replace(config.training, compile=compile)), torch.device("cpu"))
    with torch.no_grad():  # fresh networks end in zeros, where every gradient but the last is zero
        for number, parameter in enumerate(step.network.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for k in range(config.training.total_steps):
        step(k, batches(config, k, size))
        yield step


class Convolutions(TorchDispatchMode):
    """Counts convolutions' backward passes, and those among them that are given anything in NCHW.

    And gradients of activations that are copied, because the compiled code was made for another layout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.nchw: list[tuple] = []
        self.copied: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.count += 1
            self.nchw += [
                (tuple(each.shape), each.stride())
                for each in args[:2]  # the gradient of the output, and the input
                # An image's gradient is in NCHW on a CPU, as the loss has it there; on a GPU its kernel keeps
                # the layout.
                if each.stride(1) != 1 and each.shape[1] > 3
            ]
        elif func is torch.ops.aten.copy_.default and args[0].ndim == 4 and args[0].shape[1] > 3:
            self.copied.append((tuple(args[0].shape), args[1].stride()))
        return func(*args, **(kwargs or {}))


def _convolutions_of_backward(step: TrainStep, given: list[Batch]) -> Convolutions:
    """Those of a step whose blocks have been compiled."""
    watch = Convolutions()
    with pytest.MonkeyPatch.context() as patch:
        original = torch.Tensor.backward

        def backward(*args: Any, **options: Any) -> None:
            with watch:
                original(*args, **options)

        patch.setattr(torch.Tensor, "backward", backward)
        step.gradient(given)
    return watch


def _kinds_of_blocks(network: UNet) -> int:
    """Blocks that differ in nothing but the values of their weights count once."""
    kinds = set()

    def note(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        skip = named["skip_nchw"].shape if "skip_nchw" in named else None
        kinds.add((shapes, type(block.resample), arguments[0].shape, skip))

    for block in network.blocks():
        block.register_forward_pre_hook(note, with_kwargs=True)
    config = network.config
    images = torch.zeros(2, config.image_channels, config.resolution, config.resolution)
    network(images, torch.zeros(2), torch.zeros(2, dtype=torch.int64) if config.num_classes else None)
    return len(kinds)


@pytest.mark.usefixtures("compiler")
def test_the_compiled_step_has_the_eager_gradients_in_channels_last_and_is_compiled_once(
    few_blocks: Config, batches: Callable
) -> None:
    graphs = None
    stages = set()
    for eager, compiled in zip(
        _trained(few_blocks, "off", batches), _trained(few_blocks, "on", batches), strict=True
    ):
        graphs = graphs or counters["stats"]["unique_graphs"]
        stages.add(int(compiled.num_scales))
        if len(stages) == 1:  # afterwards the weights have parted, by rounding
            ours, theirs = (
                torch.cat([p.grad.flatten() for p in step.network.parameters()]) for step in (compiled, eager)
            )
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
        assert float(compiled.losses.sum) == pytest.approx(float(eager.losses.sum), rel=1e-4)
    assert len(stages) == 8
    assert compiled.compiled_blocks == 5
    assert eager.compiled_blocks == 0
    kinds = _kinds_of_blocks(eager.network)
    assert kinds == 4
    assert graphs == 2 * kinds, "each kind once with gradients and once, as the teacher, without"
    found = _convolutions_of_backward(compiled, batches(few_blocks, 1, 8))
    assert found.count > 2 * 2 * 5, "two in each block, in each of two micro-batches"
    assert found.nchw == found.copied == []
    assert counters["stats"]["unique_graphs"] == graphs, "no new stage, step or micro-batch recompiles"
    assert not counters["graph_break"]
    assert counters["aot_autograd"]["autograd_cache_saved"] == graphs

    torch._dynamo.reset()  # as a second start is
    counters.clear()
    first, again = (next(_trained(few_blocks, mode, batches)) for mode in ("off", "on"))
    made = {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}
    assert made == {"hit": graphs, "miss": 0, "bypass": 0}, "nothing is traced or made twice"
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in step.network.parameters()]) for step in (again, first)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.usefixtures("compiler")
def test_code_of_networks_or_kernels_that_changes_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps of a graph holds our ops' gradients, whose code is not in it."""
    (tmp_path / "package/inside").mkdir(parents=True)
    weight = torch.ones(3, 3, requires_grad=True)

    def product(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ weight

    def start(package: str, code: str) -> dict[str, int]:
        """What a start with this code in a package finds in the cache."""
        monkeypatch.setattr(compilation, package, SimpleNamespace(__path__=[str(tmp_path / "package")]))
        (tmp_path / "package/inside/norm.py").write_text(code)
        compilation._digest_of_code.cache_clear()
        torch._dynamo.reset()
        counters.clear()
        compile_blocks()
        torch.compile(product)(torch.ones(2, 3)).sum().backward()
        return {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss")}

    starts = [("networks", "x = 1"), ("networks", "x = 1"), ("networks", "x = 2"), ("ict_kernels", "x = 2")]
    try:
        assert [start(*each)["hit"] for each in starts] == [0, 1, 0, 0]
        assert start("ict_kernels", "x = 3") == {"hit": 0, "miss": 1}
        assert start("ict_kernels", "x = 2") == {"hit": 1, "miss": 0}
    finally:
        compilation._digest_of_code.cache_clear()


@pytest.mark.drill
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("preset", ["cifar10", "imagenet64"])
def test_a_narrow_network_of_each_family_is_compiled_once(
    tiny: Config, batches: Callable, preset: str
) -> None:
    """With all that the published ones have: several resolutions and their resampling, the pyramid, skips of
    other widths, attention, dropout, classes; through all eight stages, in two micro-batches."""
    published = presets.get(preset)
    network = replace(
        published.network, num_blocks=1, channels=8, head_channels=min(published.network.head_channels, 8)
    )
    config = replace(
        tiny,
        network=network,
        training=replace(tiny.training, total_steps=8, batch_size=4, micro_batch=2),
    )
    steps = zip(_trained(config, "off", batches, 2), _trained(config, "on", batches, 2), strict=True)
    for number, (eager, compiled) in enumerate(steps):
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]
            ours, theirs = (
                torch.cat([p.grad.flatten() for p in step.network.parameters()]) for step in (compiled, eager)
            )
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
            found = _convolutions_of_backward(compiled, batches(config, 0, 2))
            assert found.count > 4 * compiled.compiled_blocks
            assert found.nchw == found.copied == []
    blocks = [module for module in compiled.network.modules() if isinstance(module, ResidualBlock)]
    kinds = _kinds_of_blocks(eager.network)
    assert number == 7
    assert compiled.compiled_blocks == len(blocks)
    assert graphs == 2 * kinds, "each kind once with gradients and once, as the teacher, without"
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def _gradients_in(dtype: torch.dtype, step: TrainStep) -> set[str]:
    """Parameters with a gradient all of whose values this dtype has, as one computed in it."""
    return {name for name, p in step.network.named_parameters() if p.grad.to(dtype).float().equal(p.grad)}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.drill)])
def test_only_the_switch_of_precision_compiles_anew(
    few_blocks: Config, batches: Callable, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Not the measuring, which compares with gradients in fp32. And no more is computed in few bits than in
    eager mode.

    When to compile is Dynamo's part, and in which dtype that of the graphs: both without machine code too,
    which takes two minutes.
    """
    monkeypatch.setattr(
        ResidualBlock,
        "compile",
        lambda self, *, mode, **options: nn.Module.compile(self, backend=backend, **options),
    )
    training = replace(few_blocks.training, precision="bf16", micro_batch=0)
    config = replace(few_blocks, training=training)
    size = training.batch_size  # sums of micro-batches' gradients would be in fp32
    steps = _trained(config, "on", batches, size)
    step = next(steps)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 * 4
    eager = _gradients_in(torch.bfloat16, next(_trained(config, "off", batches, size)))
    assert {name for name in eager if name.endswith("conv0.weight")}
    assert not {name for name in eager if "embedding" in name}
    assert _gradients_in(torch.bfloat16, step) <= eager
    for _ in range(2):
        measure_rounding(step, 1, [batches(config, k, size) for k in range(2)])
        assert counters["stats"]["unique_graphs"] == graphs
    step.set_trunk(torch.float16)
    next(steps)
    assert counters["stats"]["unique_graphs"] == 2 * graphs
    next(steps)
    assert counters["stats"]["unique_graphs"] == 2 * graphs
    assert int(step.optimizer.skipped) == 0


@pytest.mark.usefixtures("compiler")
def test_blocks_that_would_run_uncompiled_are_an_error(few_blocks: Config, batches: Callable) -> None:
    training = replace(few_blocks.training, compile="on")
    step = TrainStep(replace(few_blocks, training=training), torch.device("cpu"))
    torch._dynamo.config.recompile_limit = 2
    with pytest.raises(FailOnRecompileLimitHit):
        step(0, batches(few_blocks, 0, 8))


@pytest.mark.usefixtures("compiler")
def test_inductor_does_not_choose_nchw_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on a GPU for a graph without the forward pass of a convolution (pytorch issue 189239)."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("gradient", "x", "weight")]
    for node, shape in zip(inputs, ((2, 8, 4, 4), (2, 8, 4, 4), (8, 8, 3, 3)), strict=True):
        node.meta["val"] = torch.empty(shape, device="meta")
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    graph.output(graph.call_function(torch.ops.aten.convolution_backward.default, (*inputs, *options)))
    backward = torch.fx.GraphModule({}, graph)
    for asked, channels_last in ((None, True), ("0", False), ("1", True)):
        monkeypatch.delenv("TORCHINDUCTOR_FORCE_LAYOUT_OPT", raising=False)
        if asked is not None:
            monkeypatch.setenv("TORCHINDUCTOR_FORCE_LAYOUT_OPT", asked)
        with torch._inductor.config.patch(force_layout_optimization=False):
            compile_blocks()
            assert GraphLowering.decide_layout_opt(backward, is_inference=False) == channels_last


def test_no_timing_says_where_autotuned_student_and_teacher_round() -> None:
    with (
        torch._inductor.config.patch(benchmark_epilogue_fusion=True),
        torch._dynamo.config.patch(recompile_limit=8),
    ):
        compile_blocks(nn.Identity())
        assert torch._inductor.config.benchmark_epilogue_fusion
        compile_blocks(nn.Identity(), autotune=True)
        assert not torch._inductor.config.benchmark_epilogue_fusion


def test_of_a_deterministic_run_no_kernel_is_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda asked=asked: asked)
        with (
            torch._inductor.config.patch(deterministic=not asked),
            torch._dynamo.config.patch(recompile_limit=8),
        ):
            compile_blocks()
            assert torch._inductor.config.deterministic == asked


def test_inductors_advice_to_allow_tf32_is_not_passed_on() -> None:
    with warnings.catch_warnings(record=True) as told, torch._dynamo.config.patch(recompile_limit=8):
        warnings.simplefilter("always")
        compile_blocks()
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in told] == ["another"]


def test_auto_compiles_on_a_gpu_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles("auto", device) for device in (cpu, gpu)] == [False, True]
    assert [compiles("off", device) for device in (cpu, gpu)] == [False, False]
    assert [compiles(asked, cpu) for asked in ("on", "max-autotune")] == [True, True]


def test_our_kernels_have_the_assembler_that_inductors_will_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    compile_blocks(torch.nn.Identity())
    assert "TRITON_PTXAS_PATH" not in os.environ, "this torch brings none"
    (tmp_path / "torch/bin").mkdir(parents=True)
    ptxas = tmp_path / "torch/bin/ptxas"
    ptxas.touch(mode=0o755)
    compile_blocks(torch.nn.Identity())
    assert os.environ["TRITON_PTXAS_PATH"] == str(ptxas)


def test_compiled_code_is_kept_by_version_and_device_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs between configurations is in the graphs, by whose hash Inductor keeps them inside."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = cache_folder()
    assert ours.parent == tmp_path / "ict-fast"
    assert ours.name == f"{__version__}-torch-{torch.__version__}-cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert cache_folder().name == f"{__version__}-torch-{torch.__version__}-NVIDIA-H100-80GB-HBM3"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # by Inductor itself, when imported
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that what was there before comes back


@pytest.mark.drill
def test_a_second_start_compiles_in_a_third_of_the_time(
    tiny: Config, tmp_path: Path, command: Callable[..., ForkedPython], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_VEC_ISA_OK", raising=False)
    seconds = []
    for number in range(2):
        process = command(tiny, tmp_path / str(number), "--training.compile", "on", spawned=True)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        found = re.search(r"compiled in (?:(\d+)m)?(\d+)s", output)
        assert found, output
        seconds.append(60 * int(found[1] or 0) + int(found[2]))
    assert seconds[0] >= 3 * seconds[1], seconds
