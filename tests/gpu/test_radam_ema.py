"""RAdam + EMA on a GPU: against float64, in CUDA graphs, with gradients that move; and never a wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ict_kernels import RAdamEMA, radam_ema_kernels, set_backend

SHAPES = ((64, 32, 3, 3), (64,), (96, 64, 1, 1), (33, 31), (), (7,), (0,), (1023,), (4097,), (20001,))
STATE = ("exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(autouse=True)
def backend_and_checks_as_they_were() -> Iterator[None]:
    yield
    set_backend("auto")
    torch.cuda.set_sync_debug_mode("default")


def make(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return params


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to("cuda", p.dtype) for p in params]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g


def values(optimizer: RAdamEMA) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *(optimizer.state[p][name] for name in STATE))]


def same(one: RAdamEMA, other: RAdamEMA) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "eps": 1e-4}, {"betas": (0.4, 0.99)}, {"betas": (0.9, 0.5)}]
)
def test_the_error_against_float64_is_at_most_twice_eager_torchs(settings):
    ours, eager, exact = make(), make(), make(dtype=torch.float64)
    optimizers = [RAdamEMA(params, lr=1e-2, ema_decay=0.9, **settings) for params in (ours, eager, exact)]
    for step in range(40):
        for params, optimizer, backend in zip(
            (ours, eager, exact), optimizers, ("triton", "eager", "eager"), strict=True
        ):
            set_gradients(params, step)
            set_backend(backend)
            optimizer.step()
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[2].grad_norm, rtol=1e-6, atol=0)
    for part in range(4):
        by_kernels, by_torch, in_fp64 = (
            torch.cat([t.double().flatten() for t in values(each)[part::4]]) for each in optimizers
        )
        slack = float(in_fp64.abs().max()) * 2**-24
        error, torchs = (float((each - in_fp64).abs().max()) for each in (by_kernels, by_torch))
        assert error <= 2 * torchs + slack
    for p, q in zip(ours, eager, strict=True):
        assert float(optimizers[0].state[p]["step"]) == float(optimizers[1].state[q]["step"]) == 40


def test_the_steps_are_those_of_torch_optim_radam():
    ours, theirs = make(), make()
    optimizer, reference = RAdamEMA(ours, lr=1e-2), torch.optim.RAdam(theirs, lr=1e-2)
    for step in range(40):
        for params, each in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_network_may_move_to_the_gpu_between_the_optimizer_and_the_first_step():
    network = nn.Linear(33, 31)
    optimizer = RAdamEMA(network.parameters())
    network.cuda()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx((33 * 31 + 31) ** 0.5)
    assert all(average.is_cuda for average in optimizer.ema_parameters())


def test_the_default_device_may_be_the_gpu(request):
    request.addfinalizer(lambda: torch.set_default_device(None))
    torch.set_default_device("cuda")
    params = [nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(3, 4))]
    optimizer = RAdamEMA(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(19**0.5)


def test_an_average_over_many_steps_is_as_close_as_torch_lerps():
    """A product ema * decay, rounded by itself, errs to the same side in each of 1 / (1 - decay) steps."""
    [p] = make(((4096,),))
    optimizer = RAdamEMA([p], lr=1e-4, ema_decay=0.9999)
    exact, lerped = p.detach().double(), p.detach().clone()
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(1000):
        p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        optimizer.step()
        exact.lerp_(p.detach().double(), 1e-4)
        lerped.lerp_(p.detach(), 1e-4)
    [average] = optimizer.ema_parameters()
    ours, theirs = ((each - exact).square().mean().sqrt() for each in (average, lerped))
    assert ours <= 1.2 * theirs


def test_three_launches_whatever_the_number_of_parameters(monkeypatch):
    names: list[str] = []
    launch = radam_ema_kernels.launch

    def note(kernel: Any, *arguments: Any, **named: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **named)

    monkeypatch.setattr(radam_ema_kernels, "launch", note)
    optimizer = RAdamEMA(make(SHAPES * 20))
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert names == ["_norm_kernel", "_scalars_kernel", "_update_kernel"]


def test_the_same_steps_give_the_same_bits():
    optimizers = [RAdamEMA(make(), lr=1e-2) for _ in range(2)]
    for step in range(10):
        for optimizer in optimizers:
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    assert same(*optimizers)
    assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_a_non_finite_gradient_anywhere_changes_not_one_bit(bad, place):
    params = make()
    optimizer, twin = RAdamEMA(params, lr=1e-2), RAdamEMA(make(), lr=1e-2)
    for each in (optimizer, twin):
        set_gradients(each.param_groups[0]["params"], 0)
        each.step()
    set_gradients(params, 1)
    if params[place].numel() == 0:
        pytest.skip("no element")
    params[place].grad.view(-1)[-1] = bad
    optimizer.step()
    assert same(optimizer, twin)
    assert bool(optimizer.last_step_skipped)
    assert int(optimizer.skipped) == 1
    assert all(float(optimizer.state[p]["step"]) == 1 for p in params)


def test_gradients_in_other_layouts_and_anywhere_in_a_bucket():
    still, moving = make(), make()
    one, other = RAdamEMA(still, lr=1e-2), RAdamEMA(moving, lr=1e-2)
    sizes = [p.numel() for p in still]
    for step in range(8):
        set_gradients(still, step)
        bucket = torch.full((sum(sizes) + 8,), torch.nan, device="cuda")
        place = step  # so the views begin at every alignment of 4 bytes
        for p, q in zip(still, moving, strict=True):
            view = bucket[place : place + p.numel()]
            place += p.numel()
            q.grad = view.view(p.shape).copy_(p.grad)  # contiguous, where the parameter is channels_last
        one.step()
        other.step()
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_slices_as_parameters_leave_what_is_beside_them():
    sizes = [p.numel() for p in make()]
    memory = torch.full((sum(sizes) + 4 * len(sizes) + 1,), 123.0, device="cuda")
    inside = torch.zeros_like(memory, dtype=torch.bool)
    params, place = [], 1
    for p in make():
        flat = memory[place : place + p.numel()]
        inside[place : place + p.numel()] = True
        params.append(nn.Parameter(flat.view(p.shape).copy_(p.detach())))
        place += p.numel() + 4
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    one, other = RAdamEMA(params, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    for step in range(7):
        set_gradients(params, step)
        set_gradients(plain, step)
        one.step()
        other.step()
    assert (memory[~inside] == 123.0).all()
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_nothing_is_waited_for_though_gradients_and_parameters_move():
    params = make()
    decay = torch.tensor(0.99, dtype=torch.float64, device="cuda")
    optimizer = RAdamEMA(params, lr=1e-2, ema_decay=decay)
    set_gradients(params, 0)
    optimizer.step()
    held = []
    torch.cuda.set_sync_debug_mode("error")
    for step in range(4):
        for p in params:
            held.append(p.grad)
            p.grad = torch.randn_like(p)
        if step == 2:
            params[0].data = params[0].data.clone(memory_format=torch.preserve_format)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(float(optimizer.state[p]["step"]) == 5 for p in params)


def warm_up(step: Any) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)


def test_a_captured_step_reads_lr_and_decay_at_each_replay():
    def build() -> tuple[list[nn.Parameter], Tensor, Tensor, RAdamEMA]:
        lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
        decay = torch.tensor(0.9, dtype=torch.float64, device="cuda")
        params = make()
        set_gradients(params, 0)
        return params, lr, decay, RAdamEMA(params, lr=lr, ema_decay=decay)

    params, lr, decay, optimizer = build()
    plain, plain_lr, plain_decay, reference = build()
    warm_up(optimizer.step)
    reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 20):
        for each, change in ((lr, 0.9), (plain_lr, 0.9), (decay, 1.001), (plain_decay, 1.001)):
            each.mul_(change)
        for p, q, g in zip(params, plain, gradients(params, step), strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)
        if step == 5:
            params[3].grad[0, 0] = plain[3].grad[0, 0] = torch.nan
        graph.replay()
        reference.step()
        assert bool(optimizer.last_step_skipped) == (step == 5)
    assert same(optimizer, reference)
    assert int(optimizer.skipped) == 1
    assert float(optimizer.state[params[0]]["step"]) == 19


def test_a_graph_of_forward_backward_and_step_lives_beside_ordinary_steps():
    def build() -> tuple[nn.Module, RAdamEMA]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(31, 64), nn.SiLU(), nn.Linear(64, 3)).cuda()
        return network, RAdamEMA(network.parameters(), lr=1e-2, ema_decay=0.9)

    network, optimizer = build()
    plain, reference = build()
    data = torch.randn(16, 31, device="cuda")

    def train(network: nn.Module, optimizer: RAdamEMA) -> None:
        optimizer.zero_grad(set_to_none=True)
        network(data).square().sum().backward()
        optimizer.step()

    warm_up(lambda: train(network, optimizer))
    train(plain, reference)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        network(data).square().sum().backward()
        optimizer.step()
    for step in range(12):
        data.copy_(torch.randn(16, 31, generator=torch.Generator().manual_seed(step)))
        if step % 3 == 2:
            train(network, optimizer)
        else:
            graph.replay()
        train(plain, reference)
    for a, b in zip(values(optimizer), values(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert float(optimizer.state[next(network.parameters())]["step"]) == 13


def test_a_capture_without_a_step_before_it_is_refused():
    params = make()
    optimizer = RAdamEMA(params)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    optimizer.step()
    assert all(float(optimizer.state[p]["step"]) == 1 for p in params)


def test_torchs_grad_scaler_drives_it():
    params, plain = make(), make()
    optimizer, reference = RAdamEMA(params, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for step, poison in enumerate((False, True, False, False)):
        set_gradients(plain, step)
        for p in params:
            p.grad = None
        factors = [p.grad.clone() for p in plain]
        loss = sum((p * g).sum() for p, g in zip(params, factors, strict=True))
        scaler.scale(loss * float("inf") if poison else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if not poison:
            reference.step()
        assert bool(optimizer.last_step_skipped) == poison
    assert scaler.get_scale() == 128.0
    assert same(optimizer, reference)  # a power of two divides exactly


def test_parameters_that_kernels_do_not_take_step_beside_the_others():
    def build() -> list[nn.Parameter]:
        params = make()
        params[3].data = params[3].data.to(torch.bfloat16)
        return params

    mixed, eager = build(), build()
    one, other = RAdamEMA(mixed, lr=1e-2), RAdamEMA(eager, lr=1e-2)
    for step in range(8):
        for params, optimizer, backend in ((mixed, one, "auto"), (eager, other, "eager")):
            set_gradients(params, step)
            if step == 5:
                params[3].grad[0, 0] = torch.inf
            set_backend(backend)
            optimizer.step()
        assert bool(one.last_step_skipped) == (step == 5)
    assert torch.equal(mixed[3], eager[3])
    for a, b in zip(mixed, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiling_the_step_changes_nothing():
    compiled, plain = make(), make()
    one, other = RAdamEMA(compiled, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    step_compiled = torch.compile(one.step)
    for step in range(3):
        set_gradients(compiled, step)
        set_gradients(plain, step)
        step_compiled()
        other.step()
    assert same(one, other)


def test_more_than_two_to_the_thirty_one_elements():
    count = 2**31 + 8192 + 5
    if torch.cuda.mem_get_info()[0] < 52 * 2**30:
        pytest.skip("needs 52 GiB of free memory")
    p = nn.Parameter(torch.randn(count, device="cuda"))
    optimizer = RAdamEMA([p], lr=1e-2, betas=(0.9, 0.99), ema_decay=0.9)
    places = (slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(count - 1000, count))
    few = [nn.Parameter(p.detach()[place].clone()) for place in places]
    reference = RAdamEMA(few, lr=1e-2, betas=(0.9, 0.99), ema_decay=0.9)
    p.grad = torch.empty_like(p)
    for _ in range(7):
        p.grad.normal_()
        for q, place in zip(few, places, strict=True):
            q.grad = p.grad[place].clone()
        optimizer.step()
        reference.step()
    for q, place in zip(few, places, strict=True):
        torch.testing.assert_close(p.detach()[place], q.detach(), rtol=1e-6, atol=1e-7)
        for name in STATE:
            torch.testing.assert_close(
                optimizer.state[p][name][place], reference.state[q][name], rtol=1e-6, atol=1e-7
            )
    total = sum(float(part.double().square().sum()) for part in p.grad.split(2**28))
    assert float(optimizer.grad_norm) == pytest.approx(total**0.5, rel=1e-5)
