"""RAdam + EMA against torch.optim.RAdam, and the step that must not happen."""

import copy
import pickle
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ict_kernels import RAdamEMA, radam_ema, set_backend


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 4, 3, 3), (8,), (5, 7), ())
    made = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
    made[0].data = made[0].data.contiguous(memory_format=torch.channels_last)
    return made


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(p.dtype)


def bits(optimizer: RAdamEMA) -> list[bytes]:
    """Every parameter and every state tensor, byte for byte."""
    state = [t for p in optimizer.state for t in (p, *optimizer.state[p].values())]
    return [t.detach().contiguous().numpy().tobytes() for t in state]


def test_to_make_it_and_to_resume_it_imports_no_dynamo():
    """Which torch's methods do at their first call, and note that they have: two seconds."""
    torchs = torch.optim.Optimizer
    methods = (torchs.add_param_group, torchs.state_dict, torchs.load_state_dict)
    notes = [vars(method.__wrapped__) for method in methods]  # type: ignore[attr-defined]
    for note in notes:
        note.pop("__dynamo_disable", None)
    optimizer = RAdamEMA(parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(notes)
    torch.optim.RAdam(parameters()).state_dict()
    assert "__dynamo_disable" in notes[1], "torch notes it still"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4},
        {"lr": 1e-2, "betas": (0.5, 0.99)},
        {"lr": 1e-2, "betas": (0.9, 0.5)},  # rho never passes 5: never rectified
    ],
)
def test_sixty_steps_are_those_of_torch_optim_radam(dtype, settings):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = RAdamEMA(ours, ema_decay=0.9, **settings)
    reference = torch.optim.RAdam(theirs, **settings)
    emas = [p.detach().clone() for p in theirs]
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for step in range(60):  # rho passes 5 at the sixth step for the default betas
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        emas = [0.9 * ema + 0.1 * p.detach() for ema, p in zip(emas, theirs, strict=True)]
        for a, b, ema, average in zip(ours, theirs, emas, optimizer.ema_parameters(), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
            torch.testing.assert_close(average, ema, **tolerance)
            for name in ("step", "exp_avg", "exp_avg_sq"):
                mine, torchs = optimizer.state[a][name], reference.state[b][name]
                torch.testing.assert_close(mine, torchs, check_dtype=name != "step", **tolerance)
    assert optimizer.state[ours[0]]["step"].dtype == torch.float32


def test_the_size_of_the_first_rectified_step_is_the_papers():
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = RAdamEMA([p], lr=1.0, eps=0.0)
    for _ in range(6):
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        optimizer.step()
    # Constant gradient 1: m_hat = v_hat = 1, so the sixth change is the rectification alone.
    rho_inf, t = 1999.0, 6
    rho = rho_inf - 2 * t * 0.999**t / (1 - 0.999**t)
    assert rho > 5
    r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    assert float(before - p.detach()) == pytest.approx(r, rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("after", [0, 3, 10])
def test_a_non_finite_gradient_anywhere_changes_not_one_bit(bad, after):
    params = parameters()
    params[1].data[0] = -0.0
    optimizer = RAdamEMA(params, lr=1e-2)
    list(optimizer.ema_parameters())
    for step in range(after):
        set_gradients(params, step)
        optimizer.step()
    before = bits(optimizer)
    for place in range(4):
        set_gradients(params, 99)
        params[place].grad.view(-1)[-1] = bad
        optimizer.step()
        assert bits(optimizer) == before
        assert bool(optimizer.last_step_skipped)
    assert int(optimizer.skipped) == 4
    assert not bool(torch.isfinite(optimizer.grad_norm))
    set_gradients(params, 100)
    optimizer.step()
    assert bits(optimizer) != before
    assert not bool(optimizer.last_step_skipped)
    assert int(optimizer.skipped) == 4
    assert float(optimizer.state[params[0]]["step"]) == after + 1


def test_a_skipped_step_leaves_the_next_ones_as_if_it_had_not_been():
    straight, disturbed = parameters(), parameters()
    one, other = RAdamEMA(straight), RAdamEMA(disturbed)
    for step in range(12):
        set_gradients(straight, step)
        one.step()
        if step % 4 == 2:
            set_gradients(disturbed, 77)
            disturbed[2].grad[0, 0] = float("nan")
            other.step()
        set_gradients(disturbed, step)
        other.step()
    assert bits(one) == bits(other)


def test_found_inf_skips_and_grad_scale_divides():
    plain, scaled = parameters(), parameters()
    one, other = RAdamEMA(plain, lr=1e-2), RAdamEMA(scaled, lr=1e-2)
    other.grad_scale = torch.tensor(1024.0)
    other.found_inf = torch.tensor(0.0)
    for step in range(8):
        set_gradients(plain, step)
        set_gradients(scaled, step, scale=1024.0)
        one.step()
        other.step()
    assert bits(one) == bits(other)  # a power of two divides exactly
    assert torch.equal(one.grad_norm, other.grad_norm)
    before = bits(other)
    other.found_inf = torch.tensor(1.0)
    other.step()
    assert bits(other) == before
    other.grad_scale = other.found_inf = None
    other.step()
    assert bits(other) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_that_of_torchs_clip_grad_norm(dtype):
    """Of the unscaled gradient of all groups; small ones (each third) stay as they are."""
    ours, theirs = parameters(dtype), parameters(dtype)
    groups = [{"params": ours[:2]}, {"params": ours[2:]}]
    optimizer, reference = RAdamEMA(groups, lr=1e-2, max_norm=5.0), torch.optim.RAdam(theirs, lr=1e-2)
    optimizer.grad_scale = torch.tensor(1024.0)
    for step in range(12):
        size = 1.0 if step % 3 else 0.1
        set_gradients(ours, step, scale=1024.0 * size)
        set_gradients(theirs, step, scale=size)
        norm = nn.utils.clip_grad_norm_(theirs, 5.0)
        assert (norm > 5.0) == bool(step % 3)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=1e-6, atol=0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_norm_below_the_limit_changes_no_bit_and_a_skipped_step_is_skipped_all_the_same():
    plain, clipped = parameters(), parameters()
    one, other = RAdamEMA(plain, lr=1e-2), RAdamEMA(clipped, lr=1e-2, max_norm=100.0)
    for step in range(8):
        for params, optimizer in ((plain, one), (clipped, other)):
            set_gradients(params, step)
            if step == 3:
                params[1].grad[0] = torch.inf
            optimizer.step()
    assert bits(one) == bits(other)
    assert int(other.skipped) == 1


def test_torchs_grad_scaler_drives_it():
    params = parameters()
    optimizer = RAdamEMA(params, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, poison in enumerate((False, True, False)):
        set_gradients(params, step)
        loss = sum((p * p.grad).sum() for p in params) * (float("inf") if poison else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.last_step_skipped) == poison
    assert scaler.get_scale() == 128.0
    assert int(optimizer.skipped) == 1
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_the_gradient_norm_is_over_all_parameters():
    params = parameters()
    optimizer = RAdamEMA(params)
    set_gradients(params, 3)
    optimizer.step()
    expected = torch.cat([p.grad.flatten().double() for p in params]).norm()
    assert float(optimizer.grad_norm) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("ema_is_looked_at", [False, True])
def test_the_step_never_waits_for_the_host(ema_is_looked_at):
    # Meta tensors have no values: whatever reads one on the host, in Python or in C++, fails.
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(shape)) for shape in ((3, 4), (5,), ())]
        optimizer = RAdamEMA(params, lr=torch.tensor(1e-2), weight_decay=0.1, ema_decay=torch.tensor(0.99))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        if ema_is_looked_at:
            list(optimizer.ema_parameters())
        for _ in range(8):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()


def test_a_network_may_move_to_its_device_between_the_optimizer_and_the_first_step(request):
    # As accelerate moves it, which gets both at once. Here meta stands for the device.
    request.addfinalizer(lambda: torch.__future__.set_swap_module_params_on_conversion(False))
    torch.__future__.set_swap_module_params_on_conversion(True)  # else this move would make new parameters
    network = nn.Linear(3, 4)
    optimizer = RAdamEMA(network.parameters())
    network.to("meta")
    for p in network.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    figures = (optimizer.grad_norm, optimizer.last_step_skipped, optimizer.skipped)
    assert {each.device.type for each in figures} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "betas": (0.5, 0.99), "max_norm": 5.0}, {"betas": (0.9, 0.5)}]
)
def test_deciding_on_the_device_or_on_the_host_gives_the_same_bits(monkeypatch, request, dtype, settings):
    # The two eager ways: a CPU looks at the verdict and steps in place, unless torch.compile is watching.
    request.addfinalizer(lambda: set_backend("auto"))
    set_backend("eager")
    in_place, beside = parameters(dtype), parameters(dtype)
    one, other = RAdamEMA(in_place, lr=1e-2, **settings), RAdamEMA(beside, lr=1e-2, **settings)
    for step in range(9):
        for params, optimizer in ((in_place, one), (beside, other)):
            set_gradients(params, step)
            if step == 4:
                params[2].grad[1, 1] = float("nan")
            if step > 6:
                params[0].grad = None
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda params=params: params is beside)
            optimizer.step()
    assert bits(one) == bits(other)
    assert int(one.skipped) == int(other.skipped) == 1


def test_tensor_learning_rates_and_decays_act_like_numbers_and_are_read_at_each_step():
    by_number, by_tensor = parameters(), parameters()
    lr, decay = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    one, other = RAdamEMA(by_number, lr=1e-2, ema_decay=0.9), RAdamEMA(by_tensor, lr=lr, ema_decay=decay)
    for step in range(10):
        if step == 5:
            lr.fill_(1e-3)
            decay.fill_(0.5)
            one.param_groups[0].update(lr=1e-3, ema_decay=0.5)
        set_gradients(by_number, step)
        set_gradients(by_tensor, step)
        one.step()
        other.step()
    assert bits(one) == bits(other)


def test_parameters_that_join_late_or_pause_have_their_own_step_as_in_torch():
    ours, theirs = parameters(), parameters()
    optimizer = RAdamEMA([{"params": ours[:3]}, {"params": ours[3:], "lr": 1e-1}], lr=1e-2)
    reference = torch.optim.RAdam([{"params": theirs[:3]}, {"params": theirs[3:], "lr": 1e-1}], lr=1e-2)
    for step in range(20):
        for params, stepper in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            if step < 7:
                params[1].grad = None
            if step % 3 == 2:  # first beside one that it began with, and that goes on
                params[2].grad = None
            stepper.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        assert float(optimizer.state[a]["step"]) == float(reference.state[b]["step"])


@pytest.mark.parametrize("ema_is_looked_at", [False, True])
def test_a_parameter_whose_state_was_taken_or_that_takes_anothers_place_begins_anew_as_in_torch(
    ema_is_looked_at,
):
    ours, theirs = parameters(), parameters()
    optimizer, reference = RAdamEMA(ours, lr=1e-2), torch.optim.RAdam(theirs, lr=1e-2)
    for step in range(20):
        for params, stepper in ((ours, optimizer), (theirs, reference)):
            if step == 4:
                params[2] = nn.Parameter(params[2].detach().clone())
                stepper.param_groups[0]["params"][2] = params[2]
            if step == 8:
                del stepper.state[params[1]]
        if ema_is_looked_at:
            list(optimizer.ema_parameters())
        for params, stepper in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step)
            stepper.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        assert float(optimizer.state[a]["step"]) == float(reference.state[b]["step"])


def test_a_parameter_that_takes_anothers_place_with_its_state_goes_on_beside_one_that_begins():
    """As when points of a scene are split or dropped: the old parameter is let go of, too."""
    ours, theirs = parameters(), parameters()
    optimizer, reference = RAdamEMA(ours, lr=1e-2), torch.optim.RAdam(theirs, lr=1e-2)
    replaced = []
    for step in range(20):
        for params, stepper in ((ours, optimizer), (theirs, reference)):
            if step == 10:
                replaced += [weakref.ref(p) for p in params[:2]]
                new = [nn.Parameter(p.detach().clone()) for p in params[:2]]
                del stepper.state[params[0]]
                stepper.state[new[1]] = stepper.state.pop(params[1])
                params[:2] = stepper.param_groups[0]["params"][:2] = new
            set_gradients(params, step)
            stepper.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        assert float(optimizer.state[a]["step"]) == float(reference.state[b]["step"])
    assert [each() for each in replaced] == [None] * 4


@pytest.mark.parametrize("with_state", [True, False])
def test_a_parameter_that_is_replaced_is_let_go_of(with_state):
    params = parameters()
    optimizer = RAdamEMA(params, lr=1e-2)
    for step in range(2):
        if step == 1:
            replaced, params[0] = weakref.ref(params[0]), nn.Parameter(params[0].detach().clone())
            state = optimizer.state.pop(optimizer.param_groups[0]["params"][0])
            if with_state:
                optimizer.state[params[0]] = state
            optimizer.param_groups[0]["params"][0] = params[0]
        set_gradients(params, step)
        optimizer.step()
    assert replaced() is None


def test_a_parameter_that_takes_anothers_place_with_its_state_does_so_before_a_capture(monkeypatch):
    """To find of how many steps its state is, the host reads, and a graph cannot hold that."""
    params = parameters()
    optimizer = RAdamEMA(params, lr=1e-2)
    set_gradients(params, 0)
    optimizer.step()
    new = nn.Parameter(params[0].detach().clone())
    optimizer.state[new] = optimizer.state.pop(params[0])
    params[0] = optimizer.param_groups[0]["params"][0] = new
    set_gradients(params, 1)
    before = bits(optimizer)
    monkeypatch.setattr(radam_ema, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()
    assert bits(optimizer) == before


def test_state_keeps_the_parameters_memory_format():
    params = parameters()
    optimizer = RAdamEMA(params)
    set_gradients(params, 0)
    optimizer.step()
    contiguous = copy.deepcopy(optimizer.state_dict())
    for state in contiguous["state"].values():
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            state[name] = state[name].contiguous()  # as a file would hand it back
    for _ in range(2):
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            assert optimizer.state[params[0]][name].stride() == params[0].stride()
        optimizer.load_state_dict(contiguous)
    assert params[0].is_contiguous(memory_format=torch.channels_last)


def test_a_restored_run_goes_on_to_the_last_bit(tmp_path):
    straight = parameters()
    one = RAdamEMA(straight, lr=1e-2, ema_decay=0.99)
    for step in range(20):
        set_gradients(straight, step)
        one.step()
        if step == 9:
            torch.save((one.state_dict(), [p.detach() for p in straight]), tmp_path / "checkpoint.pt")
    state, values = torch.load(tmp_path / "checkpoint.pt")
    resumed = parameters()
    lr = torch.tensor(0.5, dtype=torch.float64)
    other = RAdamEMA(resumed, lr=lr, ema_decay=0.5)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] is lr
    assert float(lr) == 1e-2
    assert other.param_groups[0]["ema_decay"] == 0.99
    with torch.no_grad():
        for p, value in zip(resumed, values, strict=True):
            p.copy_(value)
    for step in range(10, 20):
        set_gradients(resumed, step)
        other.step()
    assert bits(one) == bits(other)


def test_loading_shares_nothing_with_the_dict():
    params = parameters()
    optimizer = RAdamEMA(params)
    set_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    frozen = copy.deepcopy(state)
    twin = RAdamEMA(parameters())
    twin.load_state_dict(state)
    twin_params = twin.param_groups[0]["params"]
    set_gradients(twin_params, 1)
    twin.step()
    for index, saved in frozen["state"].items():
        for name, value in saved.items():
            assert torch.equal(state["state"][index][name], value)


def test_a_run_can_switch_from_and_to_torch_optim_radam():
    theirs, ours, both = parameters(), parameters(), parameters()
    reference, optimizer = torch.optim.RAdam(theirs, lr=1e-2), RAdamEMA(ours, lr=1e-2)
    for step in range(8):
        set_gradients(theirs, step)
        reference.step()
    optimizer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    assert all(torch.equal(e, p) for e, p in zip(optimizer.ema_parameters(), theirs, strict=True))
    back = torch.optim.RAdam(both, lr=1e-2)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own would share the tensors
    with torch.no_grad():
        for p, q in zip(both, theirs, strict=True):
            p.copy_(q)
    for step in range(8, 12):
        for params, stepper in ((theirs, reference), (ours, optimizer), (both, back)):
            set_gradients(params, step)
            stepper.step()
    for a, b, c in zip(theirs, ours, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_and_a_pickle_of_the_optimizer_go_on_alike_and_by_themselves(copied):
    params = parameters()
    optimizer = RAdamEMA(params, lr=1e-2)
    for step in range(8):
        set_gradients(params, step)
        if step < 3:
            params[1].grad = None
        optimizer.step()
    before = bits(optimizer)
    its_params, its = copied((params, optimizer))
    assert bits(its) == before
    for step in range(8, 12):
        set_gradients(its_params, step)
        its.step()
    assert bits(optimizer) == before
    for step in range(8, 12):
        set_gradients(params, step)
        optimizer.step()
    assert bits(its) == bits(optimizer)
    assert float(its.grad_norm) == float(optimizer.grad_norm)
    assert int(its.skipped) == 0


@pytest.mark.parametrize("before", [RAdamEMA, torch.optim.RAdam])
def test_a_schedule_of_torchs_that_begins_after_the_load_finds_what_the_one_before_left(before):
    def schedule(optimizer, done: int):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k, last_epoch=done - 1)

    optimizer = before(parameters(), lr=1e-2)
    scheduler = schedule(optimizer, 0)
    for step in range(3):
        set_gradients(optimizer.param_groups[0]["params"], step)
        optimizer.step()
        scheduler.step()
    resumed = RAdamEMA(parameters(), lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = schedule(resumed, 3)
    set_gradients(resumed.param_groups[0]["params"], 3)
    resumed.step()
    scheduler.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)
    assert set(resumed.param_groups[0]) == {*RAdamEMA(parameters()).param_groups[0], "initial_lr"}


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_an_lr_of_torchs_with_one_dimension_loads(lr):
    reference = torch.optim.RAdam(parameters(), lr=torch.tensor([1e-2]))
    optimizer = RAdamEMA(parameters(), lr=lr)
    optimizer.load_state_dict(reference.state_dict())
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2)


def test_a_state_dict_of_another_mathematics_is_refused():
    for switch in ({"maximize": True}, {"decoupled_weight_decay": True}):
        reference = torch.optim.RAdam(parameters(), **switch)
        with pytest.raises(ValueError, match=next(iter(switch))):
            RAdamEMA(parameters()).load_state_dict(reference.state_dict())


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_a_state_dict_of_an_adam_that_has_radams_moments_is_refused(other):
    reference = other(parameters(), lr=1e-2)
    set_gradients(reference.param_groups[0]["params"], 0)
    reference.step()
    with pytest.raises(ValueError, match=r"of another optimizer|decoupled_weight_decay"):
        RAdamEMA(parameters()).load_state_dict(reference.state_dict())


def of_another_shape(state: dict) -> None:
    state["state"][2]["ema"] = torch.zeros(7)


def of_another_optimizer(state: dict) -> None:
    del state["state"][2]["exp_avg"]


def of_sgd(state: dict) -> None:
    state["state"][2] = {"momentum_buffer": torch.zeros(3)}


def of_apex(state: dict) -> None:
    """Which counts its steps in the group."""
    del state["state"][2]["step"]


def of_two_rates(state: dict) -> None:
    state["param_groups"][0]["lr"] = torch.tensor([0.1, 0.2])


def of_two_steps(state: dict) -> None:
    state["state"][2]["step"] = torch.tensor([1.0, 2.0])


def of_fewer_parameters(state: dict) -> None:
    state["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_another_shape, r"ema of shape \(7,\) does not fit a parameter of shape"),
        (of_another_optimizer, "exp_avg_sq, step without exp_avg: it is of another optimizer"),
        (of_sgd, "momentum_buffer without step and exp_avg and exp_avg_sq: it is of another"),
        (of_apex, "exp_avg, exp_avg_sq without step: it is of another optimizer"),
        (of_two_rates, r"lr is one number, and here a tensor of shape \(2,\)"),
        (of_two_steps, r"a step is one number, and here a tensor of shape \(2,\)"),
        (of_fewer_parameters, "doesn't match the size"),
    ],
)
def test_a_state_dict_that_is_refused_has_changed_nothing(spoil, message):
    loaded, params = RAdamEMA(parameters(), lr=1e-2), parameters()
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = RAdamEMA(params, lr=lr, ema_decay=0.5)
    for each, steps in ((loaded, 1), (optimizer, 2)):
        for step in range(steps):
            set_gradients(each.param_groups[0]["params"], step)
            each.step()
    state = copy.deepcopy(loaded.state_dict())
    spoil(state)
    before, group = bits(optimizer), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert bits(optimizer) == before
    assert optimizer.param_groups[0] == group
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.5


def test_the_average_starts_from_the_parameters_and_a_closure_is_called():
    params = parameters()
    optimizer = RAdamEMA(params, lr=1.0, ema_decay=1.0)
    start = [p.detach().clone() for p in params]

    def closure() -> float:
        set_gradients(params, 0)
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert all(torch.equal(e, s) for e, s in zip(optimizer.ema_parameters(), start, strict=True))
    assert not torch.equal(params[0], start[0])


def test_autograd_takes_what_a_step_changes_for_changed():
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    optimizer = RAdamEMA(network.parameters(), lr=1e-2)
    loss = network(x).square().sum()
    loss.backward(retain_graph=True)
    changed = [*network.parameters(), *optimizer.ema_parameters(), optimizer.grad_norm]
    versions = [each._version for each in changed]
    optimizer.step()
    assert all(each._version > version for each, version in zip(changed, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Tied(nn.Module):
    """A buffer, a frozen parameter, and one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.frequencies = nn.Parameter(torch.arange(4.0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sin(self.first(self.norm(x)) * self.frequencies))


def test_the_averages_as_a_modules_state_dict_are_those_that_a_hand_written_average_has():
    """The groups are in another order than the module's parameters, and the frozen one is in none."""
    torch.manual_seed(0)
    network = Tied()
    average = copy.deepcopy(network)
    bias, others = network.first.bias, [network.first.weight, *network.norm.parameters()]
    optimizer = RAdamEMA([{"params": [bias]}, {"params": others}], lr=0.1, ema_decay=0.75)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for ours, p in zip(average.parameters(), network.parameters(), strict=True):
                ours.lerp_(p, 0.25)
            for ours, buffer in zip(average.buffers(), network.buffers(), strict=True):
                ours.copy_(buffer)
    weights = optimizer.ema_state_dict(network)
    assert list(weights) == list(network.state_dict())
    assert not any(t.requires_grad for t in weights.values())
    for name, expected in average.state_dict().items():
        torch.testing.assert_close(weights[name], expected)
    assert weights["norm.running_mean"].data_ptr() == network.norm.running_mean.data_ptr()
    fresh = Tied()
    fresh.load_state_dict(weights)
    wrapped = optimizer.ema_state_dict(nn.ModuleDict({"module": network}))  # as DistributedDataParallel
    assert list(wrapped) == [f"module.{name}" for name in weights]


def test_a_module_that_the_optimizer_does_not_hold_has_no_averages():
    network = Tied()
    optimizer = RAdamEMA(network.first.parameters())
    with pytest.raises(ValueError, match=r"norm\.weight is not among this optimizer's parameters"):
        optimizer.ema_state_dict(network)
    with pytest.raises(ValueError, match="frequencies is not among"):  # a frozen copy: nothing of it is held
        optimizer.ema_state_dict(nn.ModuleDict({"copy": copy.deepcopy(network).requires_grad_(False)}))


@pytest.mark.parametrize("loaded", [None, RAdamEMA, torch.optim.RAdam])
def test_state_that_is_made_in_inference_mode_trains_like_any_other(loaded):
    state = None
    if loaded is not None:
        saved = loaded(parameters(), lr=1e-2)
        set_gradients(saved.param_groups[0]["params"], 0)
        saved.step()
        state = saved.state_dict()
    runs = []
    for inference in (False, True):
        params = parameters()
        optimizer = RAdamEMA(params, lr=1e-2)
        with torch.inference_mode(inference):
            if state is not None:
                optimizer.load_state_dict(copy.deepcopy(state))
            averages = list(optimizer.ema_parameters())
        assert not any(average.requires_grad for average in averages)
        for step in range(1, 3):
            set_gradients(params, step)
            optimizer.step()
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


def test_a_step_without_gradients_does_nothing():
    optimizer = RAdamEMA(parameters())
    list(optimizer.ema_parameters())
    before = bits(optimizer)
    optimizer.step()
    assert bits(optimizer) == before


def test_low_precision_gradients_and_parameters_work():
    params = parameters(torch.bfloat16)
    optimizer = RAdamEMA(params, lr=1e-2)
    set_gradients(params, 0, scale=1e4)
    optimizer.step()
    assert not bool(optimizer.last_step_skipped)
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"ema_decay": 1.1}, "ema_decay must be"),
        ({"max_norm": 0.0}, "max_norm must be positive or None, got 0.0"),
        ({"lr": torch.tensor([1e-3])}, r"a tensor lr must be 0-dim, got shape \(1,\)"),
        ({"ema_decay": torch.tensor([0.9, 0.99])}, "a tensor ema_decay must be 0-dim"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RAdamEMA(parameters(), **settings)
    with pytest.raises(ValueError, match=message):
        RAdamEMA([{"params": parameters(), **settings}])
    optimizer = RAdamEMA(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **settings})
    assert len(optimizer.param_groups) == 1


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match="complex"):
        RAdamEMA([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.sparse_coo_tensor([[0]], [[1.0, 2.0]], (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        RAdamEMA([p]).step()


@pytest.mark.parametrize("refused", [{"dtype": torch.complex64}, {"device": "meta"}])
def test_a_group_that_is_refused_is_not_kept(refused):
    params = parameters()
    optimizer = RAdamEMA(params)
    with pytest.raises(ValueError, match=r"complex|one device"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, **refused))]})
    set_gradients(params, 0)
    optimizer.step()
    assert len(list(optimizer.ema_parameters())) == len(params)


def test_sharded_parameters_are_refused_also_those_that_come_in_the_place_of_others():
    group = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=group, rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network, plain = nn.Linear(3, 2), nn.Linear(3, 2)
        optimizer = RAdamEMA(plain.parameters())
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="DTensor"):
            RAdamEMA(network.parameters())
        optimizer.param_groups[0]["params"] = list(network.parameters())
        network(torch.ones(1, 3)).sum().backward()
        with pytest.raises(ValueError, match="DTensor"):
            optimizer.step()
        for p in network.parameters():  # with a state, they do not begin
            optimizer.state[p] = {"step": torch.zeros(())}
        with pytest.raises(ValueError, match="DTensor"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("decay", [0.99995, 0.25])
def test_an_average_over_many_steps_is_as_close_as_torch_lerps(decay, compiling, monkeypatch):
    """A product ema * decay, rounded by itself, errs to the same side in each of 1 / (1 - decay) steps."""
    if compiling:  # the branch that does not look at the verdict
        monkeypatch.setattr(radam_ema, "_may_look", lambda device: False)
    p = nn.Parameter(torch.linspace(-0.1, 0.1, 512))
    optimizer = RAdamEMA([p], lr=1e-4, ema_decay=decay)
    exact, lerped = p.detach().double(), p.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        exact.lerp_(p.detach().double(), 1.0 - decay)
        lerped.lerp_(p.detach(), 1.0 - decay)
    [average] = optimizer.ema_parameters()
    ours, theirs = ((each - exact).square().mean().sqrt() for each in (average, lerped))
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99995, 1.0])
def test_the_average_of_a_constant_is_that_constant_and_without_decay_the_parameter(decay):
    p = nn.Parameter(torch.tensor([1.0, -3.0, 1e-3]))
    optimizer = RAdamEMA([p], lr=0.0, ema_decay=decay)
    p.grad = torch.zeros_like(p)
    for _ in range(100):
        optimizer.step()
    [average] = optimizer.ema_parameters()
    assert torch.equal(average, p.detach())
    optimizer.state[p]["ema"].fill_(0.7)
    optimizer.step()
    expected = torch.full((3,), 0.7).lerp(p.detach(), 1 - decay)
    torch.testing.assert_close(average, expected, rtol=0.0 if decay in (0.0, 1.0) else 1e-6, atol=0.0)


def test_whether_a_graph_is_recorded_is_asked_of_the_parameters_gpu(monkeypatch):
    """Of the current stream of its device: another's, which may be the current one, knows nothing of it."""
    current = torch.device("cuda", 0)

    @contextmanager
    def device(other):
        nonlocal current
        before, current = current, other
        yield
        current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.index == 1)
    devices = [torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")]
    assert [radam_ema._capturing(each) for each in devices] == [True, False, False]
