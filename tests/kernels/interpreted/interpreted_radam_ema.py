"""The kernels of RAdam + EMA in the interpreter: the contract of ../test_radam_ema.py, and more."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ict_kernels import RAdamEMA, radam_ema, radam_ema_kernels, radam_ema_tables, set_backend
from ict_kernels.radam_ema import step_size
from ict_kernels.radam_ema_tables import STATE

_specification = importlib.util.spec_from_file_location(
    "contract", Path(__file__).parents[1] / "test_radam_ema.py"
)
contract = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(contract)
globals().update({name: test for name, test in vars(contract).items() if name.startswith("test_")})

SIZES = ((), (1,), (7,), (0,), (1023,), (1024,), (33, 31), (4097,), (8192,), (20001,), (3, 0))
FEW = ((), (7,), (1024,), (4097,))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **settings: Any) -> Tensor:
        made = new_empty(self, *size, **settings)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    yield
    set_backend("auto")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names: list[str] = []
    launch = radam_ema_kernels.launch

    def note(kernel: Any, *arguments: Any, **named: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **named)

    monkeypatch.setattr(radam_ema_kernels, "launch", note)
    return names


def scalars_of(optimizer: RAdamEMA, plan: radam_ema_tables.Plan, partials: Tensor | None) -> Tensor:
    figures = (optimizer.grad_norm, optimizer.last_step_skipped, optimizer.skipped)
    grad_scale = getattr(optimizer, "grad_scale", None)
    group = optimizer.param_groups[0]
    return radam_ema_kernels.launch_scalars(group, plan, partials, *figures, grad_scale, None)


def make(shapes: Any = SIZES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def values(optimizer: RAdamEMA) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *(optimizer.state[p][name] for name in STATE))]


def stepped(backend: str, optimizer: RAdamEMA) -> list[Tensor]:
    set_backend(backend)
    optimizer.step()
    set_backend("auto")
    return values(optimizer)


def exact_step(
    old: list[Tensor],
    g: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    wd: float,
) -> list[tuple[Tensor, Tensor]]:
    """(value, magnitude of what was added up to it) of p, exp_avg, exp_avg_sq and ema, in fp64."""
    p, m, v, ema, g = (each.double() for each in (*old, g))
    (b1, b2), whole_g = betas, g.abs() + wd * p.abs()
    g = g + wd * p
    m, whole_m = b1 * m + (1 - b1) * g, b1 * m.abs() + (1 - b1) * whole_g
    v, whole_v = b2 * v + (1 - b2) * g * g, b2 * v + (1 - b2) * whole_g**2
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    size, slope = torch.full_like(v, lr / (1 - b1**t)), 0 * v
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        size, slope = size * r * (1 - b2**t) ** 0.5 / (v.sqrt() + eps), whole_v / v
    p, whole_p = p - size * m, p.abs() + size * (whole_m + slope * m.abs())
    ema, whole_ema = decay * ema + (1 - decay) * p, decay * ema.abs() + (1 - decay) * whole_p
    return [(p, whole_p), (m, whole_m), (v, whole_v), (ema, whole_ema)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.1, "eps": 1e-4}, {"betas": (0.4, 0.99)}, {"betas": (0.5, 0.9), "eps": 0.0}],
)
@pytest.mark.parametrize("after", [0, 5, 40])
def test_one_step_is_the_exact_and_the_eager_one_to_two_ulps(settings, after):
    settings = {
        "lr": 1e-2,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        **settings,
    }
    params, twins = make(), make()
    by_kernels, eager = RAdamEMA(params, **settings), RAdamEMA(twins, **settings)
    list(eager.ema_parameters())
    for step in range(after):
        set_gradients(twins, step)
        stepped("eager", eager)
    by_kernels.load_state_dict(eager.state_dict())
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            p.copy_(twin)
    old = values(eager)
    set_gradients(params, 99)
    set_gradients(twins, 99)
    ours, theirs = stepped("triton", by_kernels), stepped("eager", eager)
    # The sum of gradient and penalty is rounded before it is squared.
    bound = (3 if settings["weight_decay"] else 2) * 2.0**-23
    for index, p in enumerate(params):
        at = slice(5 * index, 5 * index + 4)
        lr, betas, eps, wd, decay = settings.values()
        for a, e, (value, magnitude) in zip(
            ours[at],
            theirs[at],
            exact_step(old[at], p.grad, after + 1, lr, betas, eps, decay, wd),
            strict=True,
        ):
            assert ((a - e).abs() <= bound * magnitude).all()
            assert ((a - value).abs() <= bound * magnitude).all()
        assert ours[5 * index + 4] == after + 1
    torch.testing.assert_close(by_kernels.grad_norm, eager.grad_norm, rtol=1e-6, atol=0)


def test_sixty_steps_err_no_more_than_torch_does():
    shapes = ((33, 31), (7,))
    ours, theirs, exact = (
        make(shapes),
        make(shapes),
        [nn.Parameter(p.detach().double()) for p in make(shapes)],
    )
    optimizer = RAdamEMA(ours, lr=1e-2, ema_decay=0.9)
    in_fp32, in_fp64 = torch.optim.RAdam(theirs, lr=1e-2), torch.optim.RAdam(exact, lr=1e-2)
    for step in range(60):
        for params in (ours, theirs):
            set_gradients(params, step)
        for p, q in zip(exact, ours, strict=True):
            p.grad = q.grad.double()
        for each in (optimizer, in_fp32, in_fp64):
            each.step()

    def error(params: list[nn.Parameter]) -> float:
        return max(float((p.detach() - e.detach()).abs().max()) for p, e in zip(params, exact, strict=True))

    assert error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.5), (0.9, 0.9999), (0.99, 0.99999)])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 6, 100, 12345, 10**6])
def test_the_scalars_are_those_of_step_size(betas, done):
    p = nn.Parameter(torch.ones(1))
    optimizer = RAdamEMA([p], lr=3e-4, betas=betas, ema_decay=0.9999)
    list(optimizer.ema_parameters())
    optimizer.state[p]["step"].fill_(done)
    plan = optimizer._plan([p], False)
    scalars = scalars_of(optimizer, plan, torch.tensor([9.0, 16.0])).double()
    size, rectified = step_size(torch.tensor(done + 1.0, dtype=torch.float64), 3e-4, *betas)
    assert scalars[0] == 1
    assert scalars[1] == 1
    assert float(scalars[2]) == pytest.approx(float(size), rel=1.2e-7)
    assert scalars[3] == rectified
    assert scalars[4] == torch.tensor(0.9999)
    assert scalars[5] == torch.tensor(1 - 0.9999)
    assert scalars[6] == done + 1
    assert optimizer.grad_norm == 5


@pytest.mark.parametrize("decay", [0.99, 0.25])
def test_an_average_over_many_steps_is_as_close_as_torch_lerps(decay):
    p = nn.Parameter(torch.rand(256, generator=torch.Generator().manual_seed(0)))
    optimizer = RAdamEMA([p], lr=0.0, ema_decay=decay)
    [average] = optimizer.ema_parameters()
    average += 1e-3 * torch.rand(256, generator=torch.Generator().manual_seed(1))
    exact, lerped = average.double(), average.clone()
    p.grad = torch.ones_like(p)
    for _ in range(200):
        optimizer.step()
        exact.lerp_(p.detach().double(), 1 - decay)
        lerped.lerp_(p.detach(), 1 - decay)
    assert torch.linalg.vector_norm(average - exact) <= 1.2 * torch.linalg.vector_norm(lerped - exact)


@pytest.mark.parametrize(("max_norm", "factor"), [(2.0, 0.4), (5.0, 1.0), (7.0, 1.0), (None, 1.0)])
def test_the_factor_of_the_gradients_brings_their_norm_down(max_norm, factor):
    """A norm of 5 once unscaled by 2; a second cohort's launch finds it where the first left it."""
    p = nn.Parameter(torch.ones(1))
    optimizer = RAdamEMA([p], max_norm=max_norm)
    optimizer.grad_scale = torch.tensor(2.0)
    list(optimizer.ema_parameters())
    plan = optimizer._plan([p], False)
    for partials in (torch.tensor([36.0, 64.0]), None):
        scalars = scalars_of(optimizer, plan, partials)
        assert scalars[0] == 1
        assert scalars[1] == torch.tensor(factor / 2)
    assert optimizer.grad_norm == 5


def test_a_step_is_three_launches_whatever_the_number_of_parameters(launched):
    for shapes in (SIZES, SIZES * 5):
        optimizer = RAdamEMA(make(shapes))
        for step in range(2):
            set_gradients(optimizer.param_groups[0]["params"], step)
            launched.clear()
            optimizer.step()
            assert launched == ["_norm_kernel", "_scalars_kernel", "_update_kernel"]


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_nothing_beside_the_tensors_is_touched(offset):
    """Parameters, state and gradients are slices, aligned to 16 bytes or not, of guarded memory."""
    guard = 4

    def sliced(like: list[Tensor], fill: float = 123.0) -> tuple[Tensor, list[Tensor]]:
        room = sum(-(-t.numel() // 4) * 4 + 2 * guard for t in like) + offset
        memory, views, place = torch.full((room,), fill), [], offset + guard
        for t in like:
            views.append(memory[place : place + t.numel()].view(t.shape).copy_(t))
            place += -(-t.numel() // 4) * 4 + 2 * guard
        return memory, views

    def guards(memory: Tensor, views: list[Tensor]) -> Tensor:
        inside = torch.zeros_like(memory, dtype=torch.bool)
        for v in views:
            inside[v.storage_offset() : v.storage_offset() + v.numel()] = True
        return memory[~inside]

    reference = make()
    plain = RAdamEMA(reference, lr=1e-2)
    memory, views = sliced([p.detach() for p in reference])
    params = [nn.Parameter(v) for v in views]
    optimizer = RAdamEMA(params, lr=1e-2)
    memories = [(memory, views)]
    list(optimizer.ema_parameters())
    for name in STATE[:3]:
        memory, views = sliced([optimizer.state[p][name] for p in params])
        memories.append((memory, views))
        for p, view in zip(params, views, strict=True):
            optimizer.state[p][name] = view
    for step in range(7):
        set_gradients(reference, step)
        memory, views = sliced([p.grad for p in reference], torch.nan)
        for p, view in zip(params, views, strict=True):
            p.grad = view
        plain.step()
        optimizer.step()
    assert optimizer._plans[params[0]].aligned == (offset % 4 == 0)
    for a, b in zip(values(optimizer), values(plain), strict=True):
        assert torch.equal(a, b)
    for memory, views in memories:
        assert (guards(memory, views) == 123.0).all()


def test_gradients_may_move_and_lie_anywhere_in_a_bucket():
    still, moving = make(FEW), make(FEW)
    one, other = RAdamEMA(still, lr=1e-2), RAdamEMA(moving, lr=1e-2)
    for p in still:
        p.grad = torch.empty_like(p)
    buckets = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        bucket = torch.randn(sum(p.numel() for p in still) + 8, generator=generator)
        buckets.append(bucket)
        parts = bucket[step % 5 :][: -8 + step % 5 or None].split([p.numel() for p in still] + [0])
        for p, q, part in zip(still, moving, parts, strict=False):
            p.grad.copy_(part.view(p.shape))
            q.grad = part.view(p.shape)
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize("of_parameter", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_gradient", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_in_another_layout_reaches_the_right_elements(of_parameter, of_gradient):
    shapes = ((5, 3, 3, 2), (6, 4, 1, 1), (1, 4, 3, 3))
    params, plain = make(shapes), make(shapes)
    for p in params:
        p.data = p.data.contiguous(memory_format=of_parameter)
    optimizer, reference = RAdamEMA(params, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    for step in range(7):
        set_gradients(plain, step)
        set_gradients(params, step)
        for p in params:
            p.grad = p.grad.contiguous(memory_format=of_gradient)
        optimizer.step()
        reference.step()
    for a, b in zip(values(optimizer), values(reference), strict=True):
        assert torch.equal(a, b)
    expanded = torch.ones(()).expand(5, 3, 3, 2)
    for p, q in zip(params[:1], plain[:1], strict=True):
        p.grad, q.grad = expanded, expanded.contiguous()
    optimizer.step()
    reference.step()
    torch.testing.assert_close(params[0], plain[0], rtol=0, atol=0)


def test_strides_of_size_one_do_not_cost_a_copy():
    p = torch.zeros(6, 4, 1, 1)
    grad = torch.zeros(6, 4, 1, 1).to(memory_format=torch.channels_last)
    assert p.stride() != grad.stride()
    assert radam_ema_tables.as_stored(grad, p) is grad
    assert radam_ema_tables.as_stored(torch.zeros(6, 1, 4, 1).transpose(1, 2), p).shape == p.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e19])
@pytest.mark.parametrize("place", [0, 3])
def test_an_unhealthy_step_changes_not_one_bit(bad, place):
    """3e19 is finite, and its square is not."""
    params = make(FEW)
    optimizer = RAdamEMA(params, lr=1e-2, weight_decay=0.1)
    set_gradients(params, 0)
    optimizer.step()
    before = contract.bits(optimizer)
    set_gradients(params, 1)
    params[place].grad.view(-1)[-1] = bad
    optimizer.step()
    assert contract.bits(optimizer) == before
    assert bool(optimizer.last_step_skipped)
    assert int(optimizer.skipped) == 1


def test_the_same_steps_give_the_same_bits():
    runs = []
    for _ in range(2):
        params = make(FEW)
        optimizer = RAdamEMA(params, lr=1e-2)
        for step in range(7):
            set_gradients(params, step)
            optimizer.step()
        runs.append((contract.bits(optimizer), float(optimizer.grad_norm)))
    assert runs[0] == runs[1]


def test_a_run_can_change_backend_in_both_directions():
    straight, switching = make(FEW), make(FEW)
    one, other = RAdamEMA(straight, lr=1e-2), RAdamEMA(switching, lr=1e-2)
    for step in range(12):
        set_gradients(straight, step)
        stepped("eager", one)
        set_gradients(switching, step)
        stepped("triton" if step % 4 < 2 else "eager", other)
        if step == 6:
            state = copy.deepcopy(other.state_dict())
            other = RAdamEMA(switching, lr=1e-2)
            other.load_state_dict(state)
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("poisoned", "max_norm"), [(False, None), (True, None), (True, 3.0)])
def test_parameters_that_kernels_do_not_take_go_the_eager_way_in_the_same_step(launched, poisoned, max_norm):
    def build() -> list[nn.Parameter]:
        params = make(((5, 7), (9,), (4, 6), (3,)))
        params[1].data = params[1].data.to(torch.bfloat16)
        params[2].data = torch.zeros(4, 12)[:, ::2].copy_(params[2].data)
        params[3].data = params[3].data.double()
        return params

    mixed, eager_only = build(), build()
    one, other = (RAdamEMA(each, lr=1e-2, max_norm=max_norm) for each in (mixed, eager_only))
    for step in range(7):
        for params in (mixed, eager_only):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if poisoned and step == 3:
                params[1].grad[0] = torch.inf
        one.step()
        stepped("eager", other)
    # The strided parameter takes its dense neighbour along, being of its cohort.
    assert launched == []
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))
    mixed[2].data, eager_only[2].data = mixed[2].data.contiguous(), eager_only[2].data.contiguous()
    for step in range(7, 10):
        for params in (mixed, eager_only):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if poisoned and step == 8:
                params[3].grad[0] = torch.nan
        one.step()
        stepped("eager", other)
        assert one.last_step_skipped == other.last_step_skipped
        assert torch.equal(one.grad_norm, other.grad_norm) or poisoned
    assert launched == ["_scalars_kernel", "_update_kernel"] * 3
    assert one.skipped == other.skipped
    for a, b in zip(values(one), values(other), strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(a, b)


def test_a_parameter_that_moves_is_found_again():
    still, moving = make(((5, 3, 3, 2), (9,))), make(((5, 3, 3, 2), (9,)))
    one, other = RAdamEMA(still, lr=1e-2), RAdamEMA(moving, lr=1e-2)
    old = []
    for step in range(8):
        if step == 3:
            old = [moving[0].data, moving[0].data.clone()]
            moving[0].data = moving[0].data.clone()
        if step == 6:  # its state stays behind in the old layout: the eager way
            moving[0].data = moving[0].data.contiguous(memory_format=torch.channels_last)
        set_gradients(still, step)
        set_gradients(moving, step)
        one.step()
        other.step()
    assert torch.equal(*old)
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("change", ["enlarged", "shrunk in place", "one row in place", "gradient"])
def test_a_parameter_that_changes_shape_is_refused_and_nothing_is_written(change, backend):
    """The state, and what a parameter was, lie in guarded memory; without its state, it begins anew."""

    def guarded(t: Tensor) -> Tensor:
        memories.append(torch.full((t.numel() + 1024,), 123.0))
        return memories[-1][512 : 512 + t.numel()].view(t.shape).copy_(t)

    memories: list[Tensor] = []
    p, other = make(((8, 16), (7,)))
    p.data = guarded(p.detach())
    optimizer = RAdamEMA([p, other], lr=1e-2)
    list(optimizer.ema_parameters())
    for name in STATE[:3]:
        optimizer.state[p][name] = guarded(optimizer.state[p][name])
    set_gradients([p, other], 0)
    stepped(backend, optimizer)
    if change in ("enlarged", "gradient"):
        p.data = guarded(torch.cat([p.detach(), torch.zeros(8, 16)]))
    else:
        p.data = p.data[: 4 if change == "shrunk in place" else 1]
    wrong, message = "exp_avg", "of its new shape, or none"
    if change == "gradient":
        wrong, message = "a gradient", "set or clear that"
        for name in STATE[:3]:
            optimizer.state[p][name] = guarded(torch.zeros(16, 16))
    else:
        set_gradients([p, other], 1)
    before, others = [m.clone() for m in memories], contract.bits(optimizer)
    expected = rf"shape \({len(p)}, 16\) has {wrong} of shape \(8, 16\).*{message}"
    with pytest.raises(RuntimeError, match=expected):
        stepped(backend, optimizer)
    assert all(map(torch.equal, memories, before))
    assert contract.bits(optimizer) == others
    del optimizer.state[p]
    set_gradients([p, other], 2)
    stepped(backend, optimizer)
    assert optimizer.state[p]["exp_avg"].shape == p.shape
    assert [int(optimizer.state[each]["step"]) for each in (p, other)] == [1, 2]


def test_kernels_leave_a_step_alone_that_is_on_another_device():
    p = make(((7,),))[0]
    optimizer = RAdamEMA([p])
    state = optimizer._state_of(p)
    assert radam_ema_tables.fits(p, state)
    assert not radam_ema_tables.fits(p, state | {"step": state["step"].to("meta")})


def test_the_tables_are_made_on_the_host_whatever_torchs_default_device():
    """As under torch.set_default_device("cuda"), where pinning them would fail; meta stands for that here."""
    params, plain = make(FEW), make(FEW)
    optimizer, expected = RAdamEMA(params), RAdamEMA(plain)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(plain, step)
        with torch.device("meta"):
            optimizer.step()
        expected.step()
    assert all(map(torch.equal, values(optimizer), values(expected)))


def test_a_capture_needs_one_step_before_it_and_has_its_own_table(monkeypatch):
    params, plain = make(FEW), make(FEW)
    optimizer, reference = RAdamEMA(params, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    capturing = False
    monkeypatch.setattr(radam_ema, "_capturing", lambda device: capturing)

    def step(number: int) -> None:
        set_gradients(plain, number)
        for p, q in zip(params, plain, strict=True):
            p.grad.copy_(q.grad) if p.grad is not None else setattr(p, "grad", q.grad.clone())
        reference_capturing, capturing_now = False, capturing
        globals_capturing(reference_capturing)
        reference.step()
        globals_capturing(capturing_now)
        optimizer.step()

    def globals_capturing(value: bool) -> None:
        nonlocal capturing
        capturing = value

    set_gradients(params, 0)
    capturing = True
    with pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()
    assert not any(optimizer.state[p] for p in params)
    capturing = False
    step(0)
    plan = optimizer._plans[params[0]]
    table = plan._gradients.clone()
    home = [p.grad for p in params]
    for p in params:
        p.grad = p.grad.clone()
    capturing = True
    step(1)
    assert torch.equal(plan._gradients, table)
    assert plan in optimizer._captured.values()
    for p, grad in zip(params, home, strict=True):
        p.grad = grad
    capturing = False
    step(2)
    assert all(torch.equal(a, b) for a, b in zip(values(optimizer), values(reference), strict=True))
    params[3].data = params[3].data.clone()
    capturing = True
    with pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()


def test_compiling_the_step_changes_nothing():
    compiled, plain = make(((5, 7), (9,))), make(((5, 7), (9,)))
    one, other = RAdamEMA(compiled, lr=1e-2), RAdamEMA(plain, lr=1e-2)
    step_compiled = torch.compile(one.step, backend="aot_eager")
    for step in range(3):
        set_gradients(compiled, step)
        set_gradients(plain, step)
        step_compiled()
        other.step()
    assert contract.bits(one) == contract.bits(other)
