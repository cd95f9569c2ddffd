"""Two nodes of one rank each, with a disk of their own: what of the run's checkpoints comes through."""

from __future__ import annotations

import pytest

from pretrain.checkpoint_manifest import CheckpointName, FileEntry, Manifest
from pretrain.node_disks import Leftover
from pretrain.ranks import Ranks
from pretrain.snapshot import part_name
from tests.helpers_training import run_two_ranks

COMMON = """
    import logging, shutil
    from pathlib import Path
    from pretrain import uploads
    from pretrain.checkpoint_manifest import CheckpointName
    from pretrain.config import CheckpointConfig, StorageConfig
    from pretrain.errors import TrainerError
    from pretrain.keeper import Keeper
    from pretrain.storage import LocalStore
    from tests.helpers_training import states_of

    root = Path(sys.argv[1])
    folder, bucket = root / f"node{me.rank}", root / "bucket"
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("pretrain").addHandler(handler)
    commit = uploads.BucketRun.commit

    class Engine:
        states_stay = False
        def __init__(self, step):
            self.step = step
        def parameter_states(self):
            return iter(states_of(self.step))

    def start(resume="auto", run="run", **changes):
        config = CheckpointConfig(**{"dir": str(folder), "url": str(bucket), "keep": 1, "resume": resume, **changes})
        return Keeper(config, StorageConfig(), run, me)

    def save(kept, *steps, committed=True):
        lost = lambda *_: {"problem": "the bucket is away", "conflict": ""}
        uploads.BucketRun.commit = commit if committed else lost
        for step in steps:
            kept.save(CheckpointName(0, step, step), Engine(step), {"trainer_state.json": "{}"})
        kept.close()
        kept.check()
        uploads.BucketRun.commit = commit

    def resume(run="run"):
        kept = start(run=run)
        reader = kept.resume()
        if reader is None:
            return kept, None
        step = reader.manifest.name.step
        states = dict(states_of(step))
        assert all(torch.equal(reader.parameter_state(n)[k], s[k]) for n, s in states.items() for k in s)
        kept.upload_leftovers()
        return kept, step

    def steps(place, run="run"):
        names = [path.parent.name for path in place.glob(f"{run}/*/manifest.json")]
        return sorted(CheckpointName.parse(name).step for name in names)

    def parts(step):
        return sorted(path.name[:13] for path in folder.glob(f"run/checkpoint-epoch0-step{step}-*/*.safetensors"))

    def refused(**changes):
        try:
            start(**changes).close()
        except TrainerError as error:
            return [error.kind, error.what.replace(str(root), ""), error.shared]

    result = {}
"""


def two_nodes(tmp_path, body):
    return run_two_ranks(COMMON + body + "\n    print(json.dumps(result))\n", nodes=2, arguments=(str(tmp_path),))


def test_what_was_not_committed_comes_together_in_the_bucket_or_is_passed_over(tmp_path):
    results = two_nodes(
        tmp_path,
        """
    save(start(""), 5)
    save(start(), 10, committed=False)
    result["left"] = [steps(folder), steps(bucket), parts(10)]
    kept, result["brought together"] = resume()
    result["committed"] = steps(bucket)
    save(kept, 15, committed=False)

    if me.rank == 1:  # the machine is lost, with its disk
        shutil.rmtree(folder)
    me.barrier()
    kept, result["fallen back"] = resume()
    result["warned"] = [line for line in said if "never committed" in line]
    result["torn"] = steps(folder)
    save(kept, 20)
    result["afterwards"] = [steps(folder), steps(bucket)]

    kept, _ = resume()
    save(kept, 25, committed=False)
    if me.rank == 0:  # and now the first one, when the other has all of it
        for path in folder.glob("run/checkpoint-epoch0-step25-files25/*"):
            shutil.copy(path, root / "node1/run/checkpoint-epoch0-step25-files25")
        shutil.rmtree(folder)
    me.barrier()
    kept, result["from the other"] = resume()
    kept.close()
    result["end"] = steps(bucket)
    """,
    )
    first, second = results
    assert first["left"] == [[5, 10], [5], ["model-00001-o", "optimizer-000"]]
    assert second["left"] == [[5, 10], [5], ["model-00002-o", "optimizer-000"]]
    for result in results:
        assert result["brought together"] == 10 and result["committed"] == [10]
        assert result["fallen back"] == 10
        assert result["afterwards"] == [[20], [20]]  # the torn one is gone, too
        assert result["from the other"] == 25 and result["end"] == [25]
    (line,) = first["warned"]
    assert "step15" in line and "model-00002-of-00002.safetensors is on no node and 1 more" in line
    assert second["warned"] == [] and first["torn"] == [10, 15] and second["torn"] == [10]


def test_a_first_checkpoint_that_lost_a_node_never_was_one_and_a_damaged_one_stops_the_run(tmp_path):
    results = two_nodes(
        tmp_path,
        """
    save(start(""), 5, committed=False)
    if me.rank == 1:
        shutil.rmtree(folder)
    me.barrier()
    kept, result["afresh"] = resume()
    save(kept, 7)
    result["bucket"] = steps(bucket)
    save(start("", run="damaged"), 5, committed=False)
    if me.rank == 1:
        path = next(folder.glob("damaged/*/model-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    me.barrier()
    try:
        start(run="damaged").resume()
    except TrainerError as error:
        result["damaged"] = [error.kind, "step5" in error.what, error.shared]
    """,
    )
    for result in results:
        assert result["afresh"] is None and result["bucket"] == [7]
        assert result["damaged"] == ["checkpoint error", True, True]


def test_places_that_are_not_shared_are_refused_on_every_rank_and_shared_ones_are_not(tmp_path):
    results = two_nodes(
        tmp_path,
        """
    result["local"] = refused(url="")
    result["bucket"] = refused(url=str(root / f"bucket{me.rank}"))
    result["shared"] = refused(url="", dir=str(root / "shared"))
    me.barrier()
    result["left behind"] = [str(path) for path in root.rglob("*probe*")]
    """,
    )
    for result in results:
        kind, what, shared = result["local"]
        assert (kind, shared) == ("config error", True) and "--checkpoint.dir /node" in what
        kind, what, shared = result["bucket"]
        assert (kind, shared) == ("config error", True) and "folder /bucket" in what
        assert result["shared"] is None and result["left behind"] == []


def test_what_fails_on_one_node_is_told_on_both(tmp_path):
    results = two_nodes(
        tmp_path,
        """
    save(start(""), 5)
    if me.rank == 1:
        shutil.rmtree(folder)
        from pretrain.errors import StorageError
        def fail(*arguments):
            raise StorageError("node 1 may not", "Let it.")
    for method in ("download", "create"):
        if me.rank == 1:
            setattr(LocalStore, method, fail)
        try:
            start().resume()
        except TrainerError as error:
            result[method] = [error.kind, error.what, error.mend, error.shared]
    """,
    )
    told = ["storage error", "node 1 may not", "Let it.", True]
    assert results == [{"download": told, "create": told}] * 2


@pytest.mark.parametrize(
    ("n_writers", "missing", "damaged", "local_ranks", "lacks"),
    [
        (2, ["model-2", "optimizer-2"], [], 1, True),  # the other node is not here
        (2, ["model-1", "optimizer-1", "metadata.json"], [], 1, True),  # the first one wrote the documents
        (8, ["model-3"], [], 4, False),  # one file of one rank: damage, also where the ranks were more
        (8, ["metadata.json"], [], 4, False),
        (2, ["model-2", "optimizer-2"], ["model-1"], 1, False),
        (2, ["model-2", "optimizer-2"], [], 2, False),  # this node alone wrote all of it
        (2, [], [], 1, False),
    ],
)
def test_a_node_is_lacking_where_all_that_its_ranks_wrote_is(n_writers, missing, damaged, local_ranks, lacks):
    def whole(name):
        kind, _, rank = name.partition("-")
        return part_name(kind, int(rank) - 1, n_writers) if rank else name

    parts = [part_name(kind, rank, n_writers) for kind in ("model", "optimizer") for rank in range(n_writers)]
    files = dict.fromkeys([*parts, "metadata.json"], FileEntry(1, "AAAAAA=="))
    manifest = Manifest(CheckpointName(0, 5, 5), "attempt", 1, files)
    lost = tuple(whole(name) for name in missing)
    leftover = Leftover(manifest, (), lost, tuple(damaged), is_on_first=False)
    assert leftover.lacks_a_node(Ranks(0, local_ranks, 0, local_ranks, control=None)) == lacks
