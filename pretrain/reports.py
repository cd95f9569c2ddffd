"""How a run that ends by an error says so: one line on stderr, however many ranks have met it."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

from pretrain import log
from pretrain.config import BatchConfig
from pretrain.errors import ConfigError, TrainerError
from pretrain.model_config import ModelConfig

# No torch up here: a wrong setting is told before it is imported.

RANK_0_SPEAKS_S = 5.0
# what says so beside the types: torch's CPU allocator, CUDA and NCCL (out of memory), cuBLAS, cuDNN and cuSOLVER
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|_ALLOC_FAILED|Failed to CUDA [\w ]*alloc", re.IGNORECASE
)
LESS_MEMORY = ("--model.loss_chunks 8", "--model.activation_checkpointing full")

logger = log.get(__name__)


def report(error: TrainerError, debug: bool) -> int:
    """Print an error's line, unless another rank has; its exit code."""
    told = os.environ.get("RANK", "0")
    rank = int(told) if told.isdecimal() else 0
    if logger.hasHandlers():  # before there is a log, logging's last resort would print the line a second time
        logger.error(error.line(), extra=log.FILE_ONLY)
    if debug:
        traceback.print_exception(error)
    if error.shared and rank and not _is_unheard(error):
        time.sleep(RANK_0_SPEAKS_S)  # a launcher ends all ranks when the first one ends: not before rank 0 has said it
    elif error.shared or _is_news(error):
        print((f"[rank {rank}] " if rank else "") + log.mask(error.line()), file=sys.stderr, flush=True)
    return error.exit_code


def _is_unheard(error: TrainerError) -> bool:
    """Whether this rank, the first of a node, must say itself what all ranks should have: rank 0 can't be told.

    Before the ranks have met it may be this node's alone: an older card, other packages, another command line.
    """
    if os.environ.get("LOCAL_RANK") != "0":
        return False
    import torch

    from pretrain.ranks import tell_of_failure

    told = torch.distributed.is_initialized() or tell_of_failure(error, timedelta(seconds=RANK_0_SPEAKS_S))
    return not told


def _is_news(error: TrainerError) -> bool:
    """Whether no other rank has said it; that a peer is gone is none where any rank has said why it goes."""
    from pretrain.ranks import is_news

    return is_news(error.line(), alone=isinstance(error, PeerLost))


class PeerLost(TrainerError):
    """The connection to another rank broke: the cause is with that rank."""


def explain(error: RuntimeError) -> TrainerError | None:
    """What one of torch's errors means to a user; None where we don't know."""
    import torch

    text = " ".join(str(error).split())
    if is_out_of_memory(error):  # asked first: NCCL says so by an error of its own kind, which else means a lost peer
        return _memory_is_full(error, ["a smaller --batch.micro_size (the global batch stays the same)", *LESS_MEMORY])
    if "EADDRINUSE" in text:
        port = os.environ.get("MASTER_PORT", "")
        what = f"the ranks can't meet at MASTER_PORT {port}: it is in use on this machine"
        return ConfigError(what, "Take another, the same one on every node.")
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in text:
        cause = text.partition(". ")[0]
        return PeerLost(f"another rank is gone or out of reach: {cause:.160}", "The rank that ended first says why.")
    return None


@contextlib.contextmanager
def memory_advice(batch: BatchConfig, model: ModelConfig, world_size: int) -> Iterator[None]:
    """Say which settings to change, and to which numbers, where the memory runs out in the block.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _memory_is_full(error, _smaller(batch, model, world_size)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether one of torch's errors is that a device's or this machine's memory ran out, whichever library found it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _memory_is_full(error: RuntimeError, changes: list[str]) -> ConfigError:
    """The error, with the changes of which any would help."""
    whose = "this machine's" if "can't allocate memory" in str(error) else "the GPU's"
    mend = f"Give {', or '.join(changes)}." if changes else "Take a smaller model, more ranks or a larger machine."
    full = ConfigError(f"{whose} memory is full: {str(error).splitlines()[0]:.160}", mend)
    full.shared = False  # another rank may have room
    return full


def _smaller(batch: BatchConfig, model: ModelConfig, world_size: int) -> list[str]:
    """What takes less memory than these settings, cheapest first, each with its number."""
    micro = batch.micro_size
    sizes = [size for size in range(1, micro) if batch.global_size % (size * world_size) == 0]
    changes = [f"--batch.micro_size {max(sizes)} (it is {micro}; the global batch stays the same)"] if sizes else []
    loss_chunks, recomputing = LESS_MEMORY
    if model.loss_chunks == 1:
        changes.append(loss_chunks)
    if model.activation_checkpointing != "full":
        changes.append(recomputing)
    return changes


def end_at_once(exit_code: int) -> NoReturn:
    """End the process with this code, whatever its libraries' threads are doing.

    A rank that ends by an error leaves process groups behind whose C++ threads may be alive: taken down by the
    interpreter's own end they now and then abort the process, and the code that says what went wrong is lost. And
    where all is done and closed, taking torch's modules apart piece by piece would take half a second.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
