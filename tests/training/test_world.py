"""What processes that connect, or wait in vain, are watched by and say; each as one process meets it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, TCPStore

from ict_fast.config import TrainingConfig
from ict_fast.errors import HungError
from ict_fast.training import lookout as lookout_module
from ict_fast.training import reduction
from ict_fast.training import world as world_module
from ict_fast.training.lookout import Lookout
from ict_fast.training.reduction import AtOnce, reduction_of
from ict_fast.training.world import World, joined

CPU = torch.device("cpu")


def _outlook(count: int) -> tuple[HashStore, list[Lookout]]:
    """A lookout for each process, and where they write."""
    store = HashStore()
    return store, [Lookout(rank, count, store, 60.0) for rank in range(count)]


def _reach(lookouts: list[Lookout], step: int) -> None:
    for lookout in lookouts:
        lookout.reached(step)
        lookout._speak()


def _between_two(monkeypatch: pytest.MonkeyPatch) -> tuple[World, list[str]]:
    """The world of process 0 of two, and what it waits for under watch in each of its collectives."""
    (_, lookouts), met = _outlook(2), []
    world = World(lookouts[0])
    world.size = 2
    _reach(lookouts, 0)

    def all_reduce(tensor: torch.Tensor, *_: object, group: object = "devices") -> None:
        waits = lookouts[0].diagnosis().split(" s of ")[1].split(" (")[0]
        met.append(f"{group or 'hosts'}: {waits}{'' if lookouts[0].is_watched else ', unwatched'}")

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return world, met


@pytest.mark.parametrize("at_once", [False, True])
def test_the_connecting_of_gpus_is_watched_when_all_have_come(
    monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """NCCL would do it in DistributedDataParallel, or in the first step, for ever."""
    world, met = _between_two(monkeypatch)

    def data_parallel(network: nn.Module, **_: object) -> nn.Module:
        met.append("DDP")
        return network

    monkeypatch.setattr(reduction, "DistributedDataParallel", data_parallel)
    training = replace(TrainingConfig(), cuda_graph=at_once)
    reduction_of(nn.Linear(2, 2), world, training, torch.device("cuda"))
    connected = [
        "hosts: waiting for all processes to begin",
        "devices: waiting for the devices of all processes to connect",
    ]
    assert met == connected + ["DDP"] * (not at_once)


def test_a_host_that_waits_for_gradients_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world, met = _between_two(monkeypatch)
    AtOnce(nn.Linear(2, 2), world).finish()
    assert met == ["devices: waiting for the gradients of all processes"]


def test_when_all_gpus_hang_no_process_is_accused() -> None:
    _, lookouts = _outlook(4)
    _reach(lookouts, 12)
    for lookout in lookouts:
        assert ": no other is behind, so the GPUs or the network between them are" in lookout.diagnosis()
    # Behind is one that is at an earlier step, or does what the others do not.
    lookouts[3].reached(11)
    lookouts[3]._speak()
    assert " is still computing at step 11;" in lookouts[0].diagnosis()
    assert "no other is behind" in lookouts[3].diagnosis(), "those that are ahead are not"
    lookouts[3].reached(12)
    with lookouts[3].doing("measuring"):
        lookouts[3]._speak()
    assert ": process 3 on " in lookouts[0].diagnosis()
    assert " is still measuring at step 12;" in lookouts[0].diagnosis()
    lookouts[1].reached(11)
    assert "no other is behind" in lookouts[1].diagnosis()


def test_who_is_silent_is_found_by_the_clock_of_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1, whose clock is a minute slow, waits as process 0 does; process 2 is behind, then stopped."""
    clock = [1000.0]
    monkeypatch.setattr(lookout_module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    store, lookouts = _outlook(3)
    lookouts[0].reached(12)

    def speak(rank: int, **word: object) -> None:
        store.set(str(rank), json.dumps({"host": f"node{rank}", **word}))

    with lookouts[0].waiting("the gradients of all processes"):
        for is_stopped in (False, False, True):
            lookouts[0]._speak()
            speak(1, step=12, doing="waiting for the gradients", time=time.time() - 60)
            if not is_stopped:
                speak(2, step=11, doing="computing", time=time.time())
            found = lookouts[0].diagnosis()
            if not is_stopped:
                assert ": process 2 on node2 is still computing at step 11;" in found
            clock[0] += 100
    assert ": process 2 on node2 has been silent for 100 s, since it was computing at step 11;" in found


def test_whom_a_host_waits_for_is_behind_in_the_same_step() -> None:
    _, lookouts = _outlook(2)
    _reach(lookouts, 12)
    with lookouts[1].waiting("a decision of process 0"):
        lookouts[1]._speak()
        assert ": process 0 on " in lookouts[1].diagnosis()
        assert " is still computing at step 12;" in lookouts[1].diagnosis()
        with lookouts[0].waiting("a decision of process 0"):
            lookouts[0]._speak()
        assert ": all others wait too, so the network " in lookouts[1].diagnosis()


@pytest.mark.parametrize("where", ["init_process_group", "new_group"])
def test_a_process_that_never_joins_is_missed(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """By gloo in its first group; where that is NCCL's, which meets nobody at first, in that of the hosts."""
    agents = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(world_module, "_record", HashStore)
    monkeypatch.setattr(dist, where, lambda *_, **__: agents.wait(["/cpu//0/1"], timedelta(milliseconds=20)))
    with (
        pytest.raises(HungError, match=r"^not all of the 2 processes have joined within 6 s"),
        joined(CPU, 6.0),
    ):
        pass
