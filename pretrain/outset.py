"""What a run settles before its first step: the micro batch, whether it fits, and what measures and records it."""

from __future__ import annotations

from dataclasses import asdict, replace

import psutil
import torch

from pretrain import budget
from pretrain.budget import Prediction
from pretrain.checkpoint import CheckpointReader
from pretrain.config import Config
from pretrain.memory import Setup
from pretrain.metrics import Metrics, open_metrics
from pretrain.micro_batch import choose_micro_size
from pretrain.plan import make_setup
from pretrain.progress import carried_ledger
from pretrain.ranks import Ranks
from pretrain.telemetry import Telemetry, open_telemetry


def settle_micro_size(config: Config, device: torch.device, ranks: Ranks) -> Config:
    """The config with the micro batch chosen, where it is auto; see `micro_batch.choose_micro_size`."""
    if not config.batch.is_auto:
        return config
    size = choose_micro_size(_setup(config, ranks), device, ranks)
    return replace(config, batch=replace(config.batch, micro_size=size))


def check_memory(config: Config, device: torch.device, ranks: Ranks, force: bool) -> Prediction | None:
    """See `budget.check_memory`."""
    return budget.check_memory(_setup(config, ranks), device, ranks, force)


def _setup(config: Config, ranks: Ranks) -> Setup:
    engine, optim, masked = config.engine, config.optim, config.data.document_mask
    return make_setup(config.model, config.batch, engine, optim, config.train.precision, ranks.world_size, masked)


def open_instruments(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    total_steps: int,
    first_step: int,
    checkpoint: CheckpointReader | None,
) -> tuple[Metrics, Telemetry]:
    """What a run is measured and recorded with; see open_metrics and open_telemetry.

    Args:
        first_step: steps already done.
        checkpoint: that was resumed.
    """
    name = config.run.name
    telemetry = open_telemetry(config.log, name, device, ranks.rank, ranks.local_rank, ranks.local_world_size)
    start = {  # what the books must know of this process
        "process_began": psutil.Process().create_time(),
        "world_size": ranks.world_size,
        "measures_energy": telemetry.energy_j is not None,
    }
    metrics = open_metrics(
        config.log,
        name,
        settings=asdict(config),
        total_steps=total_steps,
        first_step=first_step,
        rank=ranks.rank,
        start=start,
        carried=carried_ledger(checkpoint) if checkpoint else None,
    )
    return metrics, telemetry
