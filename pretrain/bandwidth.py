"""How fast the ranks of this node reduce together, as ranks that the trainer's own launcher starts.

    python -m pretrain.launch --nproc_per_node=8 -m pretrain.bandwidth

Rank 0 prints one line of JSON. The rate is NCCL's "bus bandwidth": what each link carries, whatever the number of
ranks, 2 (n - 1) / n of a buffer in the time of one all-reduce (https://github.com/NVIDIA/nccl-tests, PERFORMANCE.md).
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.distributed as dist

from pretrain import hardware, ranks
from pretrain.errors import EXIT_DONE, EXIT_UNEXPECTED
from pretrain.processes import end_with_launcher
from pretrain.reports import end_at_once

BUFFER_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
ROUNDS, WARM_UPS = 7, 2
TIMEOUT_MINUTES = 1


def main() -> int:
    """Reduce a few times on this rank; the exit code, 1 where the sums are wrong."""
    end_with_launcher()
    device = hardware.resolve_device(ranks.local_ranks()[0])
    me = ranks.join(device, TIMEOUT_MINUTES)
    values = torch.empty(BUFFER_BYTES[device.type] // 4, device=device)
    seconds, right = [], True
    for _ in range(WARM_UPS + ROUNDS):
        values.fill_(me.rank + 1)
        me.barrier()
        _wait(device)
        started = time.perf_counter()
        dist.all_reduce(values)
        _wait(device)
        seconds.append(time.perf_counter() - started)
        right = right and bool((values == me.world_size * (me.world_size + 1) / 2).all())
    right = not me.any(not right)
    if me.is_first:
        moved = values.nbytes * 2 * (me.world_size - 1) / me.world_size
        rate = moved / statistics.median(seconds[WARM_UPS:]) / 1e9
        print(json.dumps({"ranks": me.world_size, "backend": dist.get_backend(), "gb_per_s": rate, "right": right}))
    ranks.leave(me)
    return EXIT_DONE if right else EXIT_UNEXPECTED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    end_at_once(main())
