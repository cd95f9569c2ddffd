"""What a run settles before its first step: its place among the ranks, the micro batch, whether it fits, and what
measures and records it."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain import budget, failpoints, hardware, host_memory, log, ranks
from pretrain.alike import check_alike
from pretrain.arguments import ROOT
from pretrain.budget import HostPrediction, Prediction
from pretrain.checkpoint import CheckpointReader
from pretrain.config import Config
from pretrain.corpus import Corpus, fetch_corpus
from pretrain.engine.ds_settings import deepspeed_settings
from pretrain.log_uploads import LogUploads, open_log_uploads
from pretrain.memory import Setup
from pretrain.metrics import Metrics, open_metrics
from pretrain.micro_batch import choose_micro_size
from pretrain.plan import make_setup
from pretrain.progress import carried_ledger
from pretrain.ranks import Ranks
from pretrain.report_page import ReportSink
from pretrain.telemetry import Telemetry, open_telemetry
from pretrain.topology import tell_topology


def meet(config: Config, debug: bool) -> tuple[torch.device, Ranks]:
    """This rank's device, checked against the precision, and its place among the ranks; from here on there is a log."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with fixed buffers
        torch.use_deterministic_algorithms(True)
    device = hardware.resolve_device(ranks.local_ranks()[0])
    hardware.check_precision(device, config.train.precision)
    if device.type == "cpu":
        host_memory.keep_freed()
    me = ranks.join(device, config.train.timeout_minutes)
    failpoints.arm(me.rank)
    log.setup(me.rank, Path(config.log.dir) / config.run.name, debug)
    check_alike(me, ROOT, _settings(config, me.world_size))
    tell_topology(me, device, config.train.timeout_minutes)
    return device, me


def _settings(config: Config, world_size: int) -> dict[str, Any]:
    """The config as a tree of sections, and what DeepSpeed is told by it and by ds_config.json."""
    tree = asdict(config)
    if config.engine.name == "deepspeed":
        optim, precision = config.optim, config.train.precision
        tree["ds_config"], _ = deepspeed_settings(config.engine, optim, config.batch.settled, precision, world_size)
    return tree


def settle_micro_size(config: Config, device: torch.device, ranks: Ranks) -> Config:
    """The config with the micro batch chosen, where it is auto; see `micro_batch.choose_micro_size`."""
    if not config.batch.is_auto:
        return config
    size = choose_micro_size(_setup(config, ranks), device, ranks)
    return replace(config, batch=replace(config.batch, micro_size=size))


def check_memory(config: Config, device: torch.device, ranks: Ranks, force: bool) -> Prediction | HostPrediction:
    """See `budget.check_memory`."""
    return budget.check_memory(_setup(config, ranks), device, ranks, force)


def _setup(config: Config, ranks: Ranks) -> Setup:
    engine, optim, masked = config.engine, config.optim, config.data.document_mask
    return make_setup(config.model, config.batch, engine, optim, config.train.precision, ranks.world_size, masked)


def find_corpus(config: Config, ranks: Ranks) -> Corpus:
    """What the run trains and validates on; see `corpus.fetch_corpus`."""
    sizes = {"global_size": config.batch.global_size, "eval_sequences": config.train.eval_sequences}
    return fetch_corpus(config.data, config.storage, config.model, ranks, seed=config.run.seed, **sizes)


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
        "measures_energy": not ranks.any(ranks.local_rank == 0 and telemetry.energy_j is None),
    }
    uploads = _open_uploads(config, ranks)
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
    if ranks.is_first and config.log.report:
        metrics.add(ReportSink(metrics.folder))
    if uploads:  # behind the report, which goes with the last copy
        metrics.add(uploads)
    return metrics, telemetry


def _open_uploads(config: Config, ranks: Ranks) -> LogUploads | None:
    """On rank 0 the copies of the logs in the bucket, where there are to be any; what this machine lacks is fetched."""
    if not (ranks.is_first and config.log.upload and config.checkpoint.url):
        return None
    folder = Path(config.log.dir) / config.run.name
    uploads = open_log_uploads(folder, config.checkpoint.url, config.storage, config.run.name)
    uploads.fetch()
    return uploads
