"""One checkpoint as a folder: write a snapshot, verify it, read it back.

    model-0000k-of-N.safetensors + index   fp32 master weights, canonical names, full shapes
    optimizer-0000k-of-N.safetensors       exp_avg/NAME, exp_avg_sq/NAME; momentum_buffer/NAME of a matrix under Muon
    config.yaml  metadata.json  training_metrics.json  trainer_state.json  tokenizer.json (if known)
    manifest.json                          written last, by rename. No manifest, no checkpoint.

A save is written beside the folder, as .NAME.saving, and takes its name when it is whole: a checkpoint of that name, of
before a roll-back, is there until then.

N is the number of ranks that shared the writing; nothing else in a checkpoint depends on it, nor on the engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint_manifest import MANIFEST_FILE, FileEntry, Manifest
from pretrain.engine.base import ParameterState
from pretrain.errors import CheckpointError, StorageError
from pretrain.failpoints import failpoint
from pretrain.files import crc32c_of_bytes, crc32c_of_file, new_file, sync
from pretrain.optim_config import ADAM_MOMENTS, MUON_MOMENTS
from pretrain.snapshot import Snapshot, part_name

INDEX_FILE = "model.safetensors.index.json"
SAVING_SUFFIX, REPLACED_SUFFIX = ".saving", ".replaced"


def write_parts(snapshot: Snapshot, folder: Path, rank: int, world_size: int) -> dict[str, FileEntry]:
    """Write this rank's two files, synced to disk; the folder is made where another node's disk has none yet.

    Raises:
        StorageError: the folder can't be written or the disk is full.
    """
    parts = {
        folder / part_name(kind, rank, world_size): tensors
        for kind, tensors in (("model", snapshot.weights), ("optimizer", snapshot.moments))
    }
    # one is synced and checksummed while the other is written: a third of the time less, and none of it under the GIL
    with ThreadPoolExecutor(len(parts)) as pool:
        entries = list(pool.map(_write_part, parts.keys(), parts.values()))
    return {path.name: entry for path, entry in zip(parts, entries, strict=True)}


def _write_part(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read; the folder knows better
        sync(path)
        return FileEntry(path.stat().st_size, crc32c_of_file(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise _write_error(path, error) from error


def write_documents(documents: Mapping[str, str], folder: Path) -> dict[str, FileEntry]:
    """Write the small text files of a checkpoint, synced to disk; raises as `write_parts`."""
    entries = {}
    for name, text in documents.items():
        data = text.encode()
        with new_file(folder / name) as file:
            file.write(data)
        entries[name] = FileEntry(len(data), crc32c_of_bytes(data))
    return entries


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Commit the folder: from this rename on it is a checkpoint; raises as `write_parts`."""
    with new_file(folder / MANIFEST_FILE) as file:
        file.write(manifest.to_bytes())


def empty_folder(folder: Path) -> None:
    """Make `folder` exist and hold nothing; what was there stops being a checkpoint first. Raises as `write_parts`."""
    try:
        remove_folder(folder)
        folder.mkdir(parents=True)
        sync(folder.parent)
    except OSError as error:
        raise _write_error(folder, error) from error


def retract_manifest(folder: Path) -> None:
    """What is in `folder` stops being a checkpoint; nothing else changes. Raises as `write_parts`."""
    try:
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(folder, error) from error


def saving_folder(folder: Path) -> Path:
    """Where a save is written that is to become `folder`."""
    return folder.with_name(f".{folder.name}{SAVING_SUFFIX}")


def replaced_folder(folder: Path) -> Path:
    """Where what was `folder` goes while a save takes its name."""
    return folder.with_name(f".{folder.name}{REPLACED_SUFFIX}")


def put_in_place(folder: Path) -> None:
    """Give a whole save its name, in place of what has that name. Raises as `write_parts`.

    A folder can't be renamed over another, so a kill may leave the name to none of the two. Both are whole then, and
    the next start calls this again.
    """
    saving, replaced = saving_folder(folder), replaced_folder(folder)
    try:
        if folder.exists():
            remove_folder(replaced)
            folder.rename(replaced)
        failpoint("checkpoint.before_rename")
        saving.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise _write_error(folder, error) from error
    with suppress(OSError):  # somebody may be reading it still: the next start sweeps it away
        remove_folder(replaced)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that no half of it is ever taken for a whole."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        return Manifest.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{folder} is no committed checkpoint: {path.name}: {error.strerror}") from error


def whole_saves(folder: Path) -> list[Manifest]:
    """Of the saves in a run's folder that a kill left whole and without their name, which the next start gives them."""
    found = []
    for saving in folder.glob(f".checkpoint-*{SAVING_SUFFIX}"):
        with suppress(CheckpointError):  # it is not whole
            found.append(read_manifest(saving))
    return found


def damaged_files(manifest: Manifest, folder: Path) -> list[str]:
    """Each file of the manifest that is missing or differs in size or checksum, with what was found."""
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry.bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {entry.bytes}")
            elif crc32c_of_file(path) != entry.crc32c:
                problems.append(f"{name} differs from the manifest's crc32c")
        except OSError as error:  # a disk that can't read a file any more has damaged it
            problems.append(f"{name} can't be read: {error.strerror}")
    return problems


class CheckpointReader:
    """Tensors and documents of a verified checkpoint folder, each tensor read from the file when it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._where: dict[str, Path] = {}
        for name in manifest.files:
            if name.endswith(".safetensors"):
                path = folder / name
                with _open_part(path) as part:
                    self._where |= dict.fromkeys(part.keys(), path)

    def document(self, name: str) -> dict[str, object]:
        """A JSON document of the checkpoint."""
        tree = json.loads((self.folder / name).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise CheckpointError(f"{self.folder / name} must hold an object, found {type(tree).__name__}")
        return tree

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the checkpoint's parameters with the model's.

        Raises:
            CheckpointError: naming each parameter that is missing, left over, or of another shape; those of several
                blocks at once.
        """
        found = {key for key in self._where if "/" not in key}
        problems = {name: "is not in the checkpoint" for name in shapes if name not in found}
        problems |= dict.fromkeys(sorted(found - set(shapes)), "is not in the model")
        for name in sorted(found & set(shapes)):
            shape = self._shape(name)
            if shape != shapes[name]:
                problems[name] = f"is {shape} in the checkpoint and {shapes[name]} in the model"
        if problems:
            raise CheckpointError(
                f"{self.folder.name} is of another model: {'; '.join(_by_block(problems))}",
                "Resume with the model section of the checkpoint's config.yaml, or start another run with --run NAME.",
            )

    def check_optimizer(self, name: str) -> None:
        """Compare the optimizer that wrote the checkpoint with the one of this name.

        Raises:
            CheckpointError: they are not the same: neither can go on from what the other remembers.
        """
        wrote = "muon" if any(key.startswith(f"{MUON_MOMENTS[0]}/") for key in self._where) else "adamw"
        if wrote != name:
            raise CheckpointError(
                f"{self.folder.name} was written by optimizer {wrote}, and optim.name is {name}",
                f"Resume with --optim.name {wrote}, or start another run with --run NAME.",
            )

    def _shape(self, key: str) -> tuple[int, ...]:
        with _open_part(self._where[key]) as part:
            return tuple(part.get_slice(key).get_shape())

    @property
    def parameter_names(self) -> list[str]:
        """Canonical names of the parameters, in the order of the files."""
        return [key for key in self._where if "/" not in key]

    def weight(self, name: str) -> Tensor:
        """One parameter, fp32 on the CPU."""
        return self._tensor(name)

    def parameter_state(self, name: str) -> ParameterState:
        """The weight and the moments of one parameter, fp32 on the CPU."""
        kept = MUON_MOMENTS if f"{MUON_MOMENTS[0]}/{name}" in self._where else ADAM_MOMENTS
        return {"weight": self._tensor(name), **{moment: self._tensor(f"{moment}/{name}") for moment in kept}}

    def _tensor(self, key: str) -> Tensor:
        if key not in self._where:
            raise CheckpointError(f"{self.folder.name} holds no tensor {key}")
        with _open_part(self._where[key]) as part:
            tensor: Tensor = part.get_tensor(key)
            return tensor


@contextmanager
def _open_part(path: Path) -> Iterator[safetensors.safe_open]:
    """One file of tensors; what is no such file, or can't be read, is a CheckpointError."""
    try:
        with safetensors.safe_open(path, framework="pt") as part:
            yield part
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors: {error}", "Resume from another checkpoint."
        ) from error


def _write_error(path: Path, error: Exception) -> StorageError:
    reason = getattr(error, "strerror", None) or str(error)
    return StorageError(
        f"can't write {path}: {reason}", "Free space or point --checkpoint.dir at a writable disk; the last one holds."
    )


def _by_block(problems: Mapping[str, str]) -> list[str]:
    """A sentence for each parameter with a problem; what ails the same one of several blocks is said once."""
    blocks: dict[tuple[str, str], list[int]] = {}
    sentences = []
    for name, problem in problems.items():
        stem, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if stem == "blocks" and number.isdecimal():
            blocks.setdefault((part, problem), []).append(int(number))
        else:
            sentences.append(f"{name} {problem}")
    for (part, problem), numbers in blocks.items():
        first, last = min(numbers), max(numbers)
        spelled = f"{first}-{last}" if last - first + 1 == len(numbers) > 1 else ",".join(map(str, sorted(numbers)))
        sentences.append(f"blocks.{spelled}.{part} {problem}")
    return sentences
