"""Start the ranks of a run on this node: torchrun, with exit codes and signals that a supervisor can rely on.

    python -m pretrain.launch --nproc_per_node=8 train.py --config production ...

Takes torchrun's options. What torchrun does otherwise:
- its exit code is 1 whatever happened; here it is the code of the worker that failed first (128 + n for signal n);
- SIGTERM makes it forget how the workers ended; here it is passed on to them, and their 75 comes back. The same for
  Ctrl+C, which doesn't reach them by itself: each worker leads a session of its own;
- it gives each worker one thread; here the cores are shared out;
- when a worker fails it leaves the others 30 s to end, whatever --shutdown-timeout says; here 5 s or what that says, so
  that a worker that is stopped (SIGSTOP, a hung driver) doesn't hold up the restart. Then comes SIGKILL.

Ranks end with the launcher, kill -9 included; and the launcher ends with the supervisor (pretrain.supervise).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, determine_local_world_size, get_args_parser

from pretrain.communication import address_towards
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_UNEXPECTED, ConfigError, TrainerError
from pretrain.processes import LAUNCHER_PID
from pretrain.rendezvous import BACKEND, NodesRendezvous, register
from pretrain.reports import end_at_once
from pretrain.stopping import SIGNALS, is_nohup

ERROR_CODES = {kind.exit_code for kind in TrainerError.__subclasses__()} - {
    EXIT_UNEXPECTED
}  # the worker printed its line
LOOPBACK, MASTER_PORT = "127.0.0.1", 29500
SAVE_S = 600  # when another node comes in, the ranks save first
SHUTDOWN_S = 5  # when one worker has failed, nothing that the others do can end well: their peer is gone


def main(argv: list[str] | None = None) -> int:
    """Run the ranks of this node to their end.

    Args:
        argv: torchrun's options, the script and its arguments; None: the command line.

    Returns:
        The exit code: 0, or that of the worker that failed first. 75 where a signal stopped the workers.
    """
    options = _parser().parse_args(argv)
    _default_rendezvous(options)
    ranks = determine_local_world_size(options.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    options.signals_to_handle = "SIGQUIT"  # the agent forgets the workers' exit codes on a signal that it handles
    if options.redirects == options.tee == "0":
        options.log_dir = options.log_dir or os.devnull  # or each start leaves a folder behind in /tmp
    seconds = SHUTDOWN_S if options.shutdown_timeout is None else options.shutdown_timeout
    with _pass_on_signals() as received, _quiet_agent(), _closing_within(seconds), _known_to_workers():
        config, command, arguments = config_from_args(options)
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            return _exit_code(error.failures, received)
        except SignalException as error:
            return 128 + error.sigval
        except (DistError, RendezvousError) as error:
            return _report_rendezvous(error, options.rdzv_endpoint)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.prog = "python -m pretrain.launch"
    parser.allow_abbrev = False  # or train.py's own --run would be read as an ambiguous --run-path
    parser.description = "Start the ranks of a run on this node; exit codes and signals pass through."
    return parser


def _default_rendezvous(options: argparse.Namespace) -> None:
    """One node meets on a free loopback port of its own; several at --master_addr and --master_port, as in
    rendezvous.py, unless a torchrun rendezvous of the user's own is asked for."""
    if options.standalone or (options.nnodes in ("1", "1:1") and not options.rdzv_endpoint):
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", f"{LOOPBACK}:0", str(uuid.uuid4())
        options.local_addr = LOOPBACK  # otherwise the host's own name must resolve, and on laptops it often doesn't
    elif options.rdzv_backend == "static" and not options.rdzv_endpoint:
        register()
        host, number = options.master_addr, options.node_rank
        options.rdzv_backend, options.rdzv_id = BACKEND, "run" if options.rdzv_id == "none" else options.rdzv_id
        options.rdzv_endpoint = f"{host}:{options.master_port or MASTER_PORT}"
        own = f"node_rank={number},is_host={int(number == 0)}"
        options.rdzv_conf = f"{options.rdzv_conf},{own}" if options.rdzv_conf else own
        options.node_rank = 0  # or torchrun warns that it does not use it
        # By its name node 0 may know itself as 127.0.1.1; the others know it by what they were told.
        options.local_addr = options.local_addr or (host if number == 0 else address_towards(host))


@contextlib.contextmanager
def _pass_on_signals() -> Iterator[list[int]]:
    """Send SIGTERM, SIGINT and SIGHUP on to the workers; yields the list of what was received.

    A thread does it, woken through a pipe: while the main thread waits for the other nodes inside a C++ call, no Python
    signal handler would run.
    """
    received: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_forward, args=(reader, received, set(psutil.Process().children())), daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writer.fileno())
    heard = [signum for signum in SIGNALS if not is_nohup(signum)]
    handlers = {signum: signal.signal(signum, lambda _signum, _frame: None) for signum in heard}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        thread.join()
        reader.close()


def _forward(signals: socket.socket, received: list[int], others: set[psutil.Process]) -> None:
    """Pass on each signal number that comes down the pipe, until it is closed; `others` are children but no workers."""
    while number := signals.recv(1):
        signum = number[0]
        if signum not in SIGNALS:
            continue
        received.append(signum)
        workers = set(psutil.Process().children()) - others
        if not workers:  # still waiting for the other nodes
            os._exit(EXIT_STOPPED)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signum)


@contextlib.contextmanager
def _known_to_workers() -> Iterator[None]:
    """Tell the workers who started them, so that they notice if it is gone."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[LAUNCHER_PID]


@contextlib.contextmanager
def _closing_within(seconds: int) -> Iterator[None]:
    """Have the agent send SIGKILL so many seconds after SIGTERM when a worker has failed: it closes without a timeout
    of its own there, and PContext's default is no option. Where another node comes in, they save first."""
    close = PContext.close

    def close_in_time(self: PContext, death_sig: signal.Signals | None = None, timeout: int | None = None) -> None:
        scaling = NodesRendezvous.current is not None and NodesRendezvous.current.scaling
        close(self, death_sig, SAVE_S if scaling else timeout or seconds)

    PContext.close = close_in_time  # type: ignore[method-assign]
    try:
        yield
    finally:
        PContext.close = close  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent's report of a worker's end off the terminal: the worker has said it, or _exit_code will."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")

    def is_news(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("failed (exitcode", "Sending process", "Unable to shutdown"))

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _exit_code(failures: Mapping[int, ProcessFailure], received: list[int]) -> int:
    """The launcher's exit code for workers that failed; says on stderr what no worker can have said itself."""
    # Timestamps are whole seconds. In one second an error that explains itself wins over a rank that lost its peer, and
    # so does one that has saved and stopped: the agent ends the others then, in whatever they are doing. A killed rank
    # comes before the one that lost it, and that before those that the agent ended (by SIGTERM) because of it.
    order = {**dict.fromkeys(ERROR_CODES, 0), EXIT_STOPPED: 1, -signal.SIGTERM: 4}

    def precedence(failure: ProcessFailure) -> int:
        return order.get(failure.exitcode, 2 if failure.exitcode < 0 else 3)

    rank, failure = min(failures.items(), key=lambda item: (item[1].timestamp, precedence(item[1])))
    code = failure.exitcode
    if code in ERROR_CODES or code == EXIT_STOPPED:
        return code
    if -code in received:  # the signal came before the worker could handle it: nothing was begun, nothing is lost
        return EXIT_STOPPED
    if code > 0:
        print(f"launch: rank {rank} (pid {failure.pid}) ended with exit code {code}", file=sys.stderr)
        return code
    hint = " (out of memory? See dmesg)" if -code == signal.SIGKILL else ""
    name = signal.Signals(-code).name
    print(f"launch: rank {rank} (pid {failure.pid}) was ended by {name}{hint}", file=sys.stderr)
    return 128 - code


def _report_rendezvous(error: Exception, where: str) -> int:
    cause = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    meeting = NodesRendezvous.current
    if meeting and meeting.met:  # nothing is wrong with the settings: another node is gone, and may come back
        print(f"launch: the nodes have lost each other at {where}: {cause:.200}", file=sys.stderr)
        return EXIT_UNEXPECTED
    mend = "Check MASTER_ADDR, NODE_RANK and the firewall on every node, or take another MASTER_PORT"
    problem = ConfigError(f"the nodes could not meet at {where}: {cause:.200}", mend)
    print(problem.line(), file=sys.stderr)
    return problem.exit_code


if __name__ == "__main__":
    end_at_once(main())  # a signal while the interpreter takes itself apart would be what is told of the run
