"""A bucket on this machine, behind the real API of Google Cloud Storage: what test_train.sh trains from and saves to.

    python scripts/embedded_bucket.py --root demo/bucket --bucket demo --endpoint-file demo/endpoint
    STORAGE_EMULATOR_HOST=$(cat demo/endpoint) python train.py --data gs://demo/shards ...

It is gcp-storage-emulator in this process, on the loopback address. Its state is files under --root and survives
restarts. It takes one request at a time and ignores generation preconditions: of several that create one object, the
last wins. That is enough for one run to try everything on, and not enough to share.

It ends, with exit code 0, on SIGTERM, on SIGINT, and when the process --parent-pid is gone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import threading
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from gcp_storage_emulator.exceptions import BadRequest
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import RESUMABLE_DIR, Storage

from pretrain.errors import ConfigError, StorageError, TrainerError
from pretrain.files import disk_problem, new_file

HOST = "127.0.0.1"
PARENT_POLL_S = 0.5


class BucketStorage(Storage):
    """The emulator's state on disk, such that a kill -9 at any moment leaves a state that can be read again."""

    def _write_config_to_file(self) -> None:
        state = {
            "buckets": self.buckets,
            "objects": self.objects,
            "resumable": self.resumable,
            "bucket_iam_policies": self.bucket_iam_policies,
            "soft_deleted": self.soft_deleted,
        }
        path = self._store._disk_path(".meta")
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)

    def add_to_resumable_upload(
        self, file_id: str, content: bytes, total_size: int | None = None, expected_start: int | None = None
    ) -> bytes | None:
        """Appends a chunk; the whole content when it was the last. The emulator's own rewrites all at each chunk."""
        path = self._store._disk_path(self._object_path(RESUMABLE_DIR, self.safe_id(file_id)))
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            received = file.tell()
            if expected_start is not None and expected_start != received:
                raise BadRequest(f"the chunk starts at {expected_start}, expected was {received}")
            file.write(content)
        received += len(content)
        return None if total_size is None or received < total_size else path.read_bytes()

    def forget_uploads(self) -> None:
        """Drops uploads that were broken off: our client starts again where the server has lost one."""
        self.resumable.clear()
        shutil.rmtree(self._store._disk_path(RESUMABLE_DIR), ignore_errors=True)

    def get_resumable_byte_count(self, file_id: str) -> int:
        """Bytes of an upload that have arrived so far."""
        path = self._store._disk_path(self._object_path(RESUMABLE_DIR, self.safe_id(file_id)))
        return path.stat().st_size if path.exists() else 0


class Handler(RequestHandler):
    """The emulator's handler; a client that stops in the middle of a request holds the others up only so long."""

    timeout = 30
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for an acknowledgement


class Server(HTTPServer):
    """One request at a time, because the emulator's state is not made for threads."""

    request_queue_size = 128

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for this machine's name, which may take seconds
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of our errors; others are one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"embedded bucket: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def serve(root: Path, bucket: str, port: int, endpoint_file: Path, parent_pid: int) -> None:
    """Serve until a signal comes or the parent is gone.

    Raises:
        StorageError: the port is in use, or `root` can't be written.
    """
    try:
        storage = BucketStorage(data_dir=str(root.absolute()))
        storage.forget_uploads()
        _make_bucket(storage, bucket)
    except json.JSONDecodeError as error:
        raise StorageError(f"{root}: the bucket's state is damaged ({error})", f"Start over: rm -r {root}") from error
    except OSError as error:
        raise disk_problem(error, root) or error from error
    with _listen(port, storage) as server:
        ended = threading.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: ended.set())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        with new_file(endpoint_file) as file:  # from here on it answers
            file.write(f"http://{HOST}:{server.server_port}".encode())
        while not ended.wait(PARENT_POLL_S) and not (parent_pid and _is_gone(parent_pid)):
            pass
        server.shutdown()
        thread.join()


def _make_bucket(storage: Storage, bucket: str) -> None:
    if storage.get_bucket(bucket) is None:
        buckets.create_bucket(bucket, storage)
        # The default keeps what was deleted for a week: pruned checkpoints would fill a laptop's disk.
        storage.get_bucket(bucket)["softDeletePolicy"]["retentionDurationSeconds"] = "0"
        storage._write_config_to_file()


def _listen(port: int, storage: Storage) -> Server:
    try:
        return Server((HOST, port), partial(Handler, storage))
    except OSError as error:
        what = f"port {port} on {HOST} can't be used ({error.strerror})"
        raise StorageError(what, "Choose another with --port, or let --port 0 find a free one.") from error


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the bucket's state")
    parser.add_argument("--bucket", default="demo", help="bucket to make where it is missing (default: demo)")
    parser.add_argument("--port", type=int, default=0, help="0, the default: a free one")
    parser.add_argument("--endpoint-file", type=Path, required=True, help="gets http://HOST:PORT once it answers")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    options = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)  # the emulator logs each request
    try:
        if not 0 <= options.port < 1 << 16:
            raise ConfigError(f"--port {options.port} is no port", "Give a number below 65536, or 0 for a free one.")
        serve(options.root, options.bucket, options.port, options.endpoint_file, options.parent_pid)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
