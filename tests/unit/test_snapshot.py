from __future__ import annotations

import threading

import pytest
import torch

from pretrain import failpoints
from pretrain.snapshot import HostBuffers, part_name, take_snapshot


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_every_tensor_exactly_once_and_evenly(world_size):
    states = [(f"w{n}", dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), torch.full((1 + n % 5, 7), float(n))))
              for n in range(30)]  # fmt: skip
    snapshots = [take_snapshot(iter(states), rank, world_size) for rank in range(world_size)]
    assert sorted(name for snapshot in snapshots for name in snapshot.weights) == sorted(name for name, _ in states)
    for rank, snapshot in enumerate(snapshots):
        moments = [f"{moment}/{name}" for name in snapshot.weights for moment in ("exp_avg", "exp_avg_sq")]
        assert sorted(snapshot.moments) == sorted(moments)
        assert snapshot.weight_map == snapshots[0].weight_map
        mine = [name for name, file in snapshot.weight_map.items() if file == part_name("model", rank, world_size)]
        assert mine == list(snapshot.weights)
    loads = [sum(weight.nbytes for weight in snapshot.weights.values()) for snapshot in snapshots]
    largest = max(state["weight"].nbytes for _, state in states)
    assert max(loads) - min(loads) <= largest
    assert snapshots[0].total_bytes == sum(loads)


def test_a_snapshot_is_a_copy_in_fp32():
    weight = torch.ones(3)
    state = {"weight": weight, "exp_avg": weight.bfloat16(), "exp_avg_sq": weight.t()}
    snapshot = take_snapshot([("w", state)], 0, 1)
    weight.zero_()
    assert snapshot.weights["w"].tolist() == [1, 1, 1]
    assert {tensor.dtype for tensor in snapshot.moments.values()} == {torch.float32}


def state_of(value):
    return {key: torch.full((4, 5), float(value)) for key in ("weight", "exp_avg", "exp_avg_sq")}


def test_states_that_stay_are_copied_by_finish_and_may_change_when_wait_returns():
    state = state_of(1)
    snapshot = take_snapshot([("w", state)], 0, 1, states_stay=True)
    may_change = threading.Event()

    def update():
        snapshot.copying.wait()
        may_change.set()
        for tensor in state.values():
            tensor.fill_(2)

    updating = threading.Thread(target=update)
    updating.start()
    assert not may_change.wait(0.05)
    snapshot.copying.finish()
    updating.join(120)
    assert state["weight"].eq(2).all()
    assert all(tensor.eq(1).all() for tensor in [*snapshot.weights.values(), *snapshot.moments.values()])


def test_a_copy_that_fails_lets_the_update_go_on():
    snapshot = take_snapshot([("w", state_of(1))], 0, 1, states_stay=True)
    snapshot.copying._left.append((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="broadcast"):
        snapshot.copying.finish()
    snapshot.copying.wait()


def test_a_disk_that_fails_before_the_copy_lets_the_update_go_on(monkeypatch):
    monkeypatch.setattr(failpoints, "_armed", {})
    monkeypatch.setenv(failpoints.VARIABLE, "snapshot.before_copy:1:raise")
    failpoints.arm(0)
    snapshot = take_snapshot([("w", state_of(1))], 0, 1, states_stay=True)
    with pytest.raises(OSError, match="failpoint"):
        snapshot.copying.finish()
    snapshot.copying.wait()


def test_the_next_snapshot_takes_the_same_memory():
    buffers = HostBuffers()
    places = []
    for value, states_stay in ((1, True), (2, False), (3, True)):
        snapshot = take_snapshot([("w", state_of(value))], 0, 1, buffers, states_stay=states_stay)
        snapshot.copying.finish()
        assert snapshot.weights["w"].eq(value).all()
        places.append(snapshot.weights["w"].data_ptr())
    assert len(set(places)) == 1
