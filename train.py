"""Pretrain a GPT from tokenized shards in a bucket.

On a laptop, everything included:          bash test_train.sh
One process:                               python train.py --config test --data FOLDER
8 GPUs, by hand (see also prod_train.sh):  python -m pretrain.launch --nproc_per_node=8 train.py \
                                               --config production --data gs://… --checkpoints gs://… --resume auto

torchrun, deepspeed, accelerate launch or anything else that sets RANK and WORLD_SIZE will do as well.

The story, told below in this order: parse → validate → build → loop → close.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Nothing up here imports torch, so that a wrong setting is told in half a second.
from pretrain import log
from pretrain.arguments import ROOT, Invocation, parse, to_yaml, world_size_from_env
from pretrain.config import Config
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, TrainerError
from pretrain.failpoints import failpoint
from pretrain.garbage import held
from pretrain.processes import LAUNCHER_PID
from pretrain.reports import end_at_once, explain, memory_advice, report
from pretrain.startup import START
from pretrain.versions import check_versions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from model import GPT
    from pretrain.batches import Position
    from pretrain.checkpoint import CheckpointReader
    from pretrain.divergence import Trouble, Watch
    from pretrain.engine.base import Engine
    from pretrain.history import LossTracker
    from pretrain.model_config import ModelConfig
    from pretrain.progress import DataOrder, Progress
    from pretrain.ranks import Ranks
    from pretrain.run import Run
    from pretrain.stopping import StopRequest

logger = log.get(__name__)


@held()
def main(argv: list[str]) -> int:
    """Run train.py and return its exit code; an expected error is one line, not a traceback."""
    # Idle OpenMP threads sleep instead of spinning: they share the cores with downloads, uploads and other ranks.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    START.begin(os.environ.get(LAUNCHER_PID, ""))
    try:
        invocation = parse(argv, world_size_from_env())
        if invocation.print_config:
            print(to_yaml(invocation.config), end="")
            return EXIT_DONE
        if invocation.config.log.version_check and (problems := check_versions(ROOT / "requirements.txt")):
            raise ConfigError(problems, "Run bash setup_env.sh, or go on anyway with --no-version-check.")
        START.ended("settings")
        return train(invocation)
    except TrainerError as error:
        return report(error, "--debug" in argv)
    except KeyboardInterrupt:
        print("stopped before the first step: nothing was begun, nothing is lost", file=sys.stderr)
        return EXIT_STOPPED
    except RuntimeError as error:  # torch raises these; some have a known mend
        if (known := explain(error)) is None:
            raise
        return report(known, "--debug" in argv)


def train(invocation: Invocation) -> int:
    """Build the run, take its steps, close it."""
    from pretrain.processes import end_with_launcher
    from pretrain.stopping import stop_request
    from pretrain.watchdog import watch

    end_with_launcher()
    run = build(invocation)
    START.ended("instruments")
    with run.metrics, run.keeper, run.telemetry, stop_request() as stop:
        with watch(run.ranks.rank, run.metrics.folder, run.config.train.hang_timeout_s) as watchdog:
            run.beat, run.excuse = watchdog.beat, watchdog.excuse
            run.keeper.excuse = watchdog.excuse
            with memory_advice(run.config.batch, run.config.model, run.ranks.world_size):
                loop(run, stop)
        return close(run)


# ---- build ----


def build(invocation: Invocation) -> Run:
    """Meet the other ranks, find what to resume, find the data, build the model and its engine."""
    from pretrain.divergence import Watch
    from pretrain.engine.build import build_engine
    from pretrain.generation import check_sample
    from pretrain.history import LossTracker
    from pretrain.keeper import Keeper
    from pretrain.outset import check_memory, find_corpus, meet, open_instruments, settle_micro_size
    from pretrain.pretrained import first_weights
    from pretrain.progress import Progress
    from pretrain.run import Run

    START.ended("torch")
    config, run_name = invocation.config, invocation.config.run.name
    device, me = meet(config, invocation.debug)
    START.ended("ranks")
    config = settle_micro_size(config, device, me)
    prediction = check_memory(config, device, me, invocation.force)
    keeper = Keeper(config.checkpoint, config.storage, run_name, me)
    checkpoint = keeper.resume()
    START.ended("checkpoints")
    corpus = find_corpus(config, me)
    START.ended("data")
    config = config.with_document_end(corpus.document_end)
    check_sample(config.log.sample_prompt, corpus.tokenizer, config.model, config.log.sample_tokens)
    model = build_model(config, device, me)
    START.ended("model")
    engine = build_engine(model, config.engine, config.optim, config.batch, config.train.precision, device, me)
    vocab_size = 0 if config.model.init_from else config.model.vocab_size
    history, watch, progress = LossTracker(), Watch(config.train, vocab_size), Progress()
    if checkpoint is None:
        engine.initialise(first_weights(config.model, config.run.seed))
    else:
        checkpoint.check_optimizer(config.optim.name)
        progress = take_over(checkpoint, config.model, engine, corpus.order, history, watch)
        keeper.upload_leftovers()
    START.ended("engine")
    total_steps = config.total_steps(corpus.batches.windows_per_epoch)
    instruments = open_instruments(config, me, device, total_steps, progress.step, checkpoint)
    parts = (config, me, device, corpus, model, engine, keeper, *instruments, history, watch, progress)
    return Run(*parts, total_steps, prediction)


def build_model(config: Config, device: torch.device, me: Ranks) -> GPT:
    """The model without memory, on the meta device: the engine takes what this rank keeps of it."""
    import torch

    from model import GPT
    from pretrain.compiler import compile_model
    from pretrain.document_mask import DocumentMask
    from pretrain.engine.base import PRECISION_DTYPES
    from pretrain.fp8 import convert
    from pretrain.kernels import Masking, choose_attention

    shape = config.model
    dtype = PRECISION_DTYPES[config.train.precision]
    masking = Masking(shape.dropout, config.train.compiles) if config.data.document_mask else None
    try:
        attention, reason = choose_attention(shape.attention, device, dtype, shape.head_dim, masking)
    except ValueError as error:
        raise ConfigError(str(error), "Choose another --model.attention, or auto.") from error
    documents = DocumentMask(attention, config.data.eot_token_id) if masking else None
    with torch.device("meta"):
        model = GPT(shape, attention, documents)
    logger.info(
        "model %s %s: %s parameters; attention by %s", shape.family, shape.size, f"{model.n_parameters():,}", reason
    )
    if config.train.precision == "fp8":
        logger.info("%d linear layers multiply in fp8; the head, the first and the last block in bf16", convert(model))
    if config.train.compiles:
        compile_model(model, device, me, config.train.compile_mode)
    return model


def take_over(
    checkpoint: CheckpointReader,
    model: ModelConfig,
    engine: Engine,
    order: DataOrder,
    history: LossTracker,
    watch: Watch,
) -> Progress:
    """Load a checkpoint into the engine, the history and the watch; returns where it stood."""
    from pretrain.model_config import parameter_shapes
    from pretrain.progress import read_progress

    checkpoint.check_shapes(dict(parameter_shapes(model)))
    progress, state = read_progress(checkpoint, order, history, watch)
    engine.load(checkpoint.parameter_state, state)
    logger.info("resumed %s: step %d, %s", checkpoint.folder.name, progress.step, progress.position)
    return progress


# ---- loop ----


def loop(run: Run, stop: StopRequest) -> None:
    """Take steps until the last one, or until a rank is asked to stop; save on the way, and go back on divergence."""
    from pretrain.rollback import roll_back

    stream = run.corpus.batches.stream(run.progress.position, run.ranks.rank, run.ranks.world_size)
    due = False
    run.check_budget()
    with contextlib.closing(stream):
        while run.progress.step < run.total_steps and not run.spent:
            run.await_batch(stream, stop)
            if run.stopped or run.starved:
                break
            failpoint("loop.before_step")
            files_before = run.progress.files
            trouble = take_step(run, stream)
            failpoint("loop.after_step")
            due = due or is_due(run, files_before)
            if trouble:
                roll_back(run, trouble)  # the stream goes on where it is: past the data of the trouble
                save(run)
            elif due and not run.watch.skipped_in_a_row:  # a row of skipped updates must not prune what is good
                save(run, may_skip=True)
            due = due and bool(run.watch.skipped_in_a_row)
            run.record_events()
            run.keeper.check()
            run.check_budget()
    if run.stopped and run.ranks.is_first:
        logger.warning("asked to stop (%s): ending at step %d", stop.signal_name or "another rank", run.progress.step)
    elif run.spent and run.ranks.is_first:
        logger.warning("%s: ending at step %d of %d", run.spent, run.progress.step, run.total_steps)


def take_step(run: Run, stream: Iterator[tuple[np.ndarray, Position]]) -> Trouble | None:
    """One optimizer step, its validation and its record where they are due; what is wrong, if anything."""
    import torch

    from pretrain.divergence import Observation
    from pretrain.optim import learning_rate
    from pretrain.progress import step_seed

    config = run.config
    tokens, position = next(stream)
    lr = learning_rate(run.engine.state().optimizer_steps, run.total_steps, config.optim)
    # Dropout's randomness is a function of where the run stands, so there is no generator state to save.
    torch.manual_seed(step_seed(config.run.seed, run.progress.step, run.ranks.rank))
    result = run.engine.train_step(torch.from_numpy(tokens).split(config.batch.micro_size), lr)
    loss = run.ranks.mean(float(result.loss))
    step_s = run.timer.lap()

    files = run.corpus.batches.files_processed(position)
    progress = run.progress.after_step(position, files, config.tokens_per_step, result.applied, step_s)
    begin = run.progress.position
    run.advance(progress, step_s)
    trouble = run.watch.observe(
        Observation(progress.step, loss, result.grad_norm, lr, run.loss_scale, result.applied, begin)
    )
    first, last = progress.step == run.first_step + 1, progress.step == run.total_steps
    evaluates = trouble is None and (last or divides(config.train.eval_interval, progress.step))
    if evaluates:
        with run.phase("eval"):
            evaluate(run)
    if first or last or evaluates or trouble or divides(config.log.interval, progress.step):
        run.record(result, loss, lr, run.val_loss if evaluates else None)
    return trouble


def evaluate(run: Run) -> None:
    """The validation loss, and a sample; each where it is asked for."""
    import torch

    from pretrain.engine.validation import validation_loss

    if run.corpus.validation is not None:
        sequences = torch.from_numpy(run.corpus.validation)
        run.val_loss = validation_loss(run.engine, sequences, run.config.batch.micro_size, run.ranks)
        run.history.validated(run.progress.step, run.val_loss)
    run.sample()


def divides(interval: int, number: int) -> bool:
    """Whether a stretch of `interval` (0: there is none) ends at this number."""
    return interval > 0 and number % interval == 0


def is_due(run: Run, files_before: int) -> bool:
    """Whether the step just taken ended a stretch of `every_files` shards or of `every_steps` steps."""
    files, steps = run.config.checkpoint.every_files, run.config.checkpoint.every_steps
    by_files = files > 0 and run.progress.files // files > files_before // files
    return by_files or divides(steps, run.progress.step)


def save(run: Run, may_skip: bool = False) -> None:
    """Hand a snapshot of this step to the keeper; training waits only for the copy.

    Args:
        may_skip: `checkpoint.when_busy` may leave this one out.
    """
    from pretrain.manifest import TOKENIZER_NAME
    from pretrain.progress import checkpoint_documents

    documents = checkpoint_documents(
        run.progress, run.engine.state(), run.history, run.corpus.order, run.about, run.watch, run.ledger()
    )
    documents["config.yaml"] = to_yaml(run.config)
    if run.corpus.tokenizer is not None:
        documents[TOKENIZER_NAME] = run.corpus.tokenizer
    with run.phase("checkpoint"):
        stall_ms = run.keeper.save(run.progress.checkpoint_name, run.engine, documents, may_skip=may_skip)
    if stall_ms is not None:
        logger.info("%s: snapshot taken, training waited %.0f ms", run.progress.checkpoint_name, stall_ms)


# ---- close ----


def close(run: Run) -> int:
    """Save what is not saved, wait for the uploads, write the summary; the exit code."""
    from pretrain.console import print_summary
    from pretrain.ranks import leave

    if run.progress.step > max(run.first_step, run.keeper.last_saved_step):
        save(run)
    run.keeper.close()
    run.record_events()
    run.keeper.check()
    run.record_energy()
    run.telemetry.close()  # the page that is drawn at the end reads what it wrote
    if run.ranks.is_first:
        summary = run.summary()
        run.metrics.summary(summary)
        if not run.starved:
            run.metrics.ended(run.stopped, run.spent)
            run.metrics.close()
        print_summary(summary, log.console(), run.next_commands())
    run.check_data()
    leave(run.ranks)
    if run.stopped:
        return EXIT_STOPPED
    run.keeper.check_last_commit()
    return EXIT_DONE


if __name__ == "__main__":
    end_at_once(main(sys.argv[1:]))
