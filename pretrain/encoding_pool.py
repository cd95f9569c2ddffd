"""Workers that turn units into parts: processes of this machine, or a Ray cluster.

    with LocalPool(work, n_workers) as pool:
        take = pool.submit(unit)
        part = take(lambda: None)

Both run the same function on the same unit, so that their parts have the same bytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pretrain.documents import Reading
from pretrain.encoders import Encoder, open_encoder
from pretrain.errors import ConfigError, StorageError, TrainerError
from pretrain.files import new_file
from pretrain.parts import Part, write_part
from pretrain.raw_files import Unit

RAY_RETRIES = 5

Take = Callable[[Callable[[], None]], Part]
"""Waits for a part and returns it, calling what it is given now and then; raises what the unit raised."""
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Work:
    """What a worker is to do with units."""

    reading: Reading
    tokenizer_json: str
    library: str
    """tokenizers or tiktoken."""
    stop: bool
    """Whether a document that can't be used is an error."""
    folder: str
    """Where parts go."""


class Pool(Protocol):
    """Takes units, gives parts."""

    def submit(self, unit: Unit) -> Take:
        """Have a unit done."""
        ...

    def progress(self) -> tuple[int, int]:
        """(bytes of text, tokens) done so far by all workers, units that are not complete included where known."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class _Failure:
    """An error on its way through a pipe: pickling an exception loses all but its first words."""

    kind: type[TrainerError]
    what: str
    mend: str


@lru_cache(maxsize=1)
def _encoder(tokenizer_json: str, library: str) -> Encoder:
    return open_encoder(tokenizer_json, library)


# ---- processes ----

_work: Work
_done: tuple[Synchronized[int], Synchronized[int]]


def _begin(work: Work, n_bytes: Synchronized[int], n_tokens: Synchronized[int]) -> None:
    """Make this process a worker."""
    global _work, _done
    _work, _done = work, (n_bytes, n_tokens)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers share the processors, not their threads
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach all processes; the main one ends the others
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: it holds both ends of the queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count(n_bytes: int, n_tokens: int) -> None:
    for counter, n in zip(_done, (n_bytes, n_tokens), strict=True):
        with counter.get_lock():
            counter.value += n


def _do(unit: Unit) -> Part | _Failure:
    try:
        encoder = _encoder(_work.tokenizer_json, _work.library)
        return write_part(unit, _work.reading, encoder, Path(_work.folder), stop=_work.stop, on_progress=_count)
    except TrainerError as error:
        return _Failure(type(error), error.what, error.mend)


class LocalPool:
    """Processes of this machine; they end with this one, whatever ends it."""

    def __init__(self, work: Work, n_workers: int) -> None:
        # Started anew, not forked: a fork of a process with threads (progress, uploads) may hang.
        context = multiprocessing.get_context("spawn")
        self._done = (context.Value("q", 0), context.Value("q", 0))
        self._pool = ProcessPoolExecutor(n_workers, context, _begin, (work, *self._done))

    def submit(self, unit: Unit) -> Take:
        """See Pool."""
        try:
            future = self._pool.submit(_do, unit)
        except BrokenProcessPool as error:
            raise _lost_worker() from error

        def take(meanwhile: Callable[[], None]) -> Part:
            try:
                while wait([future], LOOK_EVERY_S).not_done:
                    meanwhile()
                return _unpacked(future.result())
            except BrokenProcessPool as error:
                raise _lost_worker() from error

        return take

    def progress(self) -> tuple[int, int]:
        """See Pool."""
        n_bytes, n_tokens = self._done
        return n_bytes.value, n_tokens.value

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:  # nobody wants what they are at
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)


def _lost_worker() -> StorageError:
    return StorageError(
        "a worker process was killed, perhaps for want of memory",
        "Start again: it goes on from here. Fewer worker processes need less memory.",
    )


def _unpacked(result: Part | _Failure) -> Part:
    if isinstance(result, _Failure):
        raise result.kind(result.what, result.mend)
    return result


# ---- Ray ----


def _do_remote(unit: Unit, work: Work) -> tuple[Part | _Failure, list[bytes]]:
    """A unit on whatever machine; its files come back as they are."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        try:
            encoder = _encoder(work.tokenizer_json, work.library)
            reading = dataclasses.replace(work.reading, scratch=folder)  # the main process's folder is not here
            part = write_part(unit, reading, encoder, Path(folder), stop=work.stop)
        except TrainerError as error:
            return _Failure(type(error), error.what, error.mend), []
        return part, [path.read_bytes() for path in part.paths(Path(folder))]


class RayPool:
    """A Ray cluster. A unit whose worker or machine is lost is done again elsewhere.

    Its machines must reach the input under the same names: gs://, or a disk that all of them mount.

    Args:
        address: as ray.init takes it: auto, HOST:PORT, ray://HOST:PORT, or local for one of this machine's own.

    Raises:
        ConfigError: ray is missing, or no cluster answers there.
    """

    def __init__(self, work: Work, address: str) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError("--ray needs the package ray", "pip install -r requirements-ray.txt") from error
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {error}", "Look at it: ray status") from error
        self._folder = Path(work.folder)
        self._work = ray.put(work)
        # Any failure of a worker is worth another try; what a unit itself raises comes back as a _Failure.
        self._do = ray.remote(max_retries=RAY_RETRIES)(_do_remote)
        self._n_bytes = self._n_tokens = 0

    def submit(self, unit: Unit) -> Take:
        """See Pool."""
        reference = self._do.remote(unit, self._work)

        def take(meanwhile: Callable[[], None]) -> Part:
            try:
                while not self._ray.wait([reference], timeout=LOOK_EVERY_S)[0]:
                    meanwhile()
                result, contents = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                raise StorageError(
                    f"Ray lost {unit.file.name} {RAY_RETRIES + 1} times: {type(error).__name__}",
                    "Look at the cluster (ray status), and start again: it goes on from here",
                ) from error
            part = _unpacked(result)
            for path, content in zip(part.paths(self._folder), contents, strict=True):
                with new_file(path) as file:
                    file.write(content)
            self._n_bytes += unit.n_bytes
            self._n_tokens += part.tokens
            return part

        return take

    def progress(self) -> tuple[int, int]:
        """See Pool; here of units that were taken."""
        return self._n_bytes, self._n_tokens

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ray.shutdown()
