"""The micro batch where `batch.micro_size` is auto: the largest that divides the global batch and fits on every rank.

First the plan: the largest that it predicts to fit. Then, on a GPU, a trial: a model of the run's shape goes forward
and backward with so many sequences while a ballast stands for all that the engine will hold beside them; where memory
runs out the next smaller size is tried. Nothing in a trial is a collective, so a rank that is out of memory leaves
nobody waiting; after each the ranks agree whether all of them had room. The model of the trial is another than the
run's, no weight is updated, and the random state is put back: of a trial nothing is left but the number.

A CPU has no allocator that refuses: there the plan against the free memory of the host, shared by its ranks, decides,
up to MOST_CPU_TOKENS tokens, for more only stop fitting into its caches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from model import GPT
from pretrain import host_memory, log, memory
from pretrain.document_mask import DocumentMask
from pretrain.engine.base import PRECISION_DTYPES
from pretrain.errors import ConfigError
from pretrain.kernels import Masking, choose_attention
from pretrain.memory import COMPUTE_BYTES, Setup
from pretrain.ranks import Ranks
from pretrain.reports import is_out_of_memory

MOST_CPU_TOKENS = 8192  # of a micro batch

logger = log.get(__name__)


def choose_micro_size(setup: Setup, device: torch.device, ranks: Ranks) -> int:
    """The micro batch of the run, the same on every rank. A collective.

    Args:
        setup: the run's, with any micro batch.

    Returns:
        1 where not even that is predicted to fit: whether it may be tried is for `check_memory` to say.

    Raises:
        ConfigError: the trial's memory does not even take one sequence.
    """
    if device.type == "cpu":
        size = agreed(planned_on_cpu(setup, ranks.local_world_size), ranks)
        why = f"the plan against the free memory of this host, at most {MOST_CPU_TOKENS:,} tokens: a CPU needs no more"
    else:
        card = torch.cuda.get_device_properties(device).total_memory
        planned = agreed(memory.largest_micro_size(setup, memory.available_bytes(card)), ranks)
        size = planned and back_off(setup, planned, lambda tried: fits(tried, device), ranks)
        why = f"the plan said {planned}, and a trial on every rank bears out {size}"
    size = size or 1
    if ranks.is_first:
        chosen = setup.with_micro_size(size).batch
        parts = f"{size} × {chosen.accumulation(setup.world_size)} accumulated × {setup.world_size} ranks"
        logger.info("batch.micro_size auto: %d (%s); %d = %s", size, why, chosen.global_size, parts)
    return size


def agreed(size: int, ranks: Ranks) -> int:
    """The smallest size of all ranks. A collective."""
    return min(int(answer["micro_size"]) for answer in ranks.exchange({"micro_size": size}))


def planned_on_cpu(setup: Setup, local_ranks: int) -> int:
    """The largest micro batch that a rank's share of the host's free memory takes; 0: none does.

    Args:
        local_ranks: that share the host.
    """
    room = memory.available_bytes(host_memory.free_bytes()) // local_ranks
    few = [size for size in setup.micro_sizes if size == 1 or size * setup.model.seq_len <= MOST_CPU_TOKENS]
    sized = [setup.with_micro_size(size) for size in few]
    fitting = [each.batch.micro_size for each in sized if host_memory.host_bytes(each, 1, "cpu") <= room]
    return max(fitting, default=0)


def back_off(setup: Setup, largest: int, fit: Callable[[Setup], bool], ranks: Ranks) -> int:
    """The largest size, from `largest` downwards, for which `fit` is true on every rank. A collective.

    Raises:
        ConfigError: there is none.
    """
    for size in sorted((size for size in setup.micro_sizes if size <= largest), reverse=True):
        if not ranks.any(not fit(setup.with_micro_size(size))):
            return size
        if ranks.is_first:
            logger.warning("batch.micro_size auto: %d sequences are out of memory on a rank", size)
    error = ConfigError(
        "batch.micro_size auto: not even one sequence fits beside what the engine holds",
        "Give --model.activation_checkpointing full or --model.loss_chunks 8, or see nvidia-smi for who else is there.",
    )
    error.shared = True
    raise error


def fits(setup: Setup, device: torch.device) -> bool:
    """Whether a forward and a backward pass of the micro batch fit beside what the engine holds. Leaves no trace."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            _go_forward_and_backward(setup, device)
            fit = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fit = False
    # Only here the traceback, and with it all that it held, is gone.
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return fit


def _go_forward_and_backward(setup: Setup, device: torch.device) -> None:
    model, dtype = setup.model, PRECISION_DTYPES[setup.precision]
    masking = Masking(model.dropout) if setup.document_mask else None
    try:
        kernel, _ = choose_attention(model.attention, device, dtype, model.head_dim, masking)
    except ValueError as error:
        raise ConfigError(str(error), "Choose another --model.attention, or auto.") from error
    with device:
        gpt = GPT(model, kernel, DocumentMask(kernel, 1) if masking else None).to(dtype)
    for parameter in gpt.parameters():  # the ballast has room for what the engine keeps of gradients
        parameter.register_post_accumulate_grad_hook(_drop)
    ballast = torch.empty(ballast_bytes(setup), dtype=torch.uint8, device=device)
    tokens = torch.zeros(setup.batch.micro_size, model.seq_len + 1, dtype=torch.int64, device=device)
    gpt(tokens[:, :-1], tokens[:, 1:]).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del ballast


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def ballast_bytes(setup: Setup) -> int:
    """Bytes that the engine holds beside the weights when activations and logits are at their most.

    Where it divides the weights, the model of the trial has more of them than a rank of the run, and the ballast is so
    much less. That the other moments of a step fit is the plan's word.
    """
    moment = max(memory.timeline(setup), key=lambda each: each.activations + each.logits)
    whole = COMPUTE_BYTES[setup.precision] * sum(memory.parameter_sizes(setup.model))
    return max(0, moment.total - moment.activations - moment.logits - whole)
