from __future__ import annotations

import logging

import pytest
import torch

import train
from pretrain import ranks, reports
from pretrain.config import BatchConfig
from pretrain.errors import CheckpointError, ConfigError, DivergenceError, ShardError, StorageError
from pretrain.model_config import ModelConfig
from tests.helpers_training import run_two_ranks

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
    ),
    torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nLast error:\nFailed to CUDA calloc 6291456 bytes"),
]
ADVISED = (BatchConfig(8, 2), ModelConfig(), 1)


def as_rank(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(
    ("kind", "code"), [(ConfigError, 2), (ShardError, 3), (StorageError, 4), (CheckpointError, 5), (DivergenceError, 6)]
)
def test_an_error_is_one_line_and_its_exit_code(monkeypatch, capsys, kind, code):
    as_rank(monkeypatch, 0)
    assert reports.report(kind("it broke\nhere", "Mend it."), debug=False) == code
    out, err = capsys.readouterr()
    assert out == "" and err == f"{kind.kind}: it broke here. Mend it.\n"


def test_an_error_of_one_rank_is_said_by_that_rank(monkeypatch, capsys):
    as_rank(monkeypatch, 3)
    reports.report(ShardError("x.npz is torn"), debug=False)
    assert capsys.readouterr().err == "[rank 3] data error: x.npz is torn\n"


def test_an_error_of_every_rank_is_said_by_rank_0_and_the_others_let_it_speak(monkeypatch, capsys):
    waits: list[float] = []
    monkeypatch.setattr(reports.time, "sleep", waits.append)
    shared = StorageError("disk full")
    shared.shared = True
    for rank in (2, 1, 0):
        as_rank(monkeypatch, rank)
        for error in (shared, ConfigError("wrong"), DivergenceError("nan")):
            assert reports.report(error, debug=False) == error.exit_code
    assert capsys.readouterr().err.splitlines() == ["storage error: disk full", "config error: wrong", "diverged: nan"]
    assert waits == [reports.RANK_0_SPEAKS_S] * 6


@pytest.mark.parametrize(("told", "lines"), [(True, []), (False, ["[rank 8] config error: an old card"])])
def test_before_the_ranks_have_met_a_node_speaks_where_rank_0_can_not_be_told(monkeypatch, capsys, told, lines):
    monkeypatch.setattr(reports.time, "sleep", lambda _: None)
    monkeypatch.setattr(ranks, "tell_of_failure", lambda error, patience: told)
    for rank, local_rank in ((9, 1), (8, 0)):
        as_rank(monkeypatch, rank)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert reports.report(ConfigError("an old card"), debug=False) == 2
    assert capsys.readouterr().err.splitlines() == lines


def test_an_error_before_there_is_a_log_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger("pretrain"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    as_rank(monkeypatch, 0)
    reports.report(ConfigError("wrong"), debug=False)
    assert capsys.readouterr().err == "config error: wrong\n"


def test_of_two_ranks_with_the_same_error_one_says_it_and_a_lost_peer_is_no_news_then():
    answers = run_two_ranks(
        """
        from pretrain.ranks import is_news
        first = [is_news("a peer is gone", alone=True)]
        me.barrier()
        said = [is_news("x is torn"), is_news(f"rank {me.rank} has its own")]
        me.barrier()
        print(json.dumps({"first": first, "said": said, "then": is_news("a peer is gone", alone=True)}))
        """
    )
    assert [answer["first"] for answer in answers] == [[True], [True]]
    assert sorted(answer["said"] for answer in answers) == [[False, True], [True, True]]
    assert [answer["then"] for answer in answers] == [False, False]


def test_debug_shows_where_it_came_from(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    try:
        raise ConfigError("wrong")
    except ConfigError as error:
        reports.report(error, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_an_error_line_shows_no_secret(monkeypatch, capsys):
    as_rank(monkeypatch, 0)
    reports.report(StorageError("https://x/?X-Goog-Signature=abcdef0123456789 failed"), debug=False)
    assert "abcdef0123456789" not in capsys.readouterr().err


def test_a_full_gpu_is_explained_by_the_rank_that_has_it(monkeypatch, capsys):
    def full(argv, world_size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(train, "parse", full)
    as_rank(monkeypatch, 5)
    assert train.main([]) == 2
    line = capsys.readouterr().err
    assert line.startswith("[rank 5] config error: the GPU's memory is full: CUDA out of memory.")
    assert "--batch.micro_size" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]."),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_a_lost_peer_is_one_line_that_leaves_the_cause_to_the_peer(monkeypatch, capsys, error):
    def lost(argv, world_size):
        raise error

    monkeypatch.setattr(train, "parse", lost)
    as_rank(monkeypatch, 1)
    assert train.main([]) == 1
    line = capsys.readouterr().err
    assert line.startswith("[rank 1] error: another rank is gone or out of reach: ") and line.count("\n") == 1
    assert line.endswith("The rank that ended first says why.\n")


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_is_told_as_that_whichever_library_found_it(error):
    known = reports.explain(error)
    assert known is not None and known.exit_code == 2 and known.what.startswith("the GPU's memory is full: ")
    assert "--batch.micro_size" in known.mend
    with pytest.raises(ConfigError, match="the GPU's memory is full"), reports.memory_advice(*ADVISED):
        raise error


def test_an_error_that_nobody_can_explain_keeps_its_traceback(monkeypatch):
    assert reports.explain(RuntimeError("shape mismatch")) is None

    def broken(argv, world_size):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train, "parse", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train.main([])


def test_a_machine_without_the_memory_says_so():
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
    known = reports.explain(RuntimeError(text))
    assert known is not None and known.exit_code == 2 and "this machine's memory is full" in known.line()


@pytest.mark.parametrize(
    ("batch", "model", "world_size", "mend"),
    [
        (
            BatchConfig(128, 8),
            ModelConfig(),
            8,
            "Give --batch.micro_size 4 (it is 8; the global batch stays the same), or --model.loss_chunks 8, or "
            "--model.activation_checkpointing full.",
        ),
        (
            BatchConfig(18, 9),  # 2 × 9 halves to nothing: the next that divides
            ModelConfig(loss_chunks=8, activation_checkpointing="full"),
            1,
            "Give --batch.micro_size 6 (it is 9; the global batch stays the same).",
        ),
        (BatchConfig(8, 1), ModelConfig(loss_chunks=2), 8, "Give --model.activation_checkpointing full."),
        (
            BatchConfig(8, 1),
            ModelConfig(loss_chunks=2, activation_checkpointing="full"),
            8,
            "Take a smaller model, more ranks or a larger machine.",
        ),
    ],
)
def test_memory_that_runs_out_names_the_setting_and_the_number(batch, model, world_size, mend):
    with pytest.raises(ConfigError) as caught, reports.memory_advice(batch, model, world_size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert caught.value.mend == mend
    assert caught.value.what == "the GPU's memory is full: CUDA out of memory. Tried to allocate 2 GiB"


def test_other_errors_pass_through_the_advice():
    with pytest.raises(ZeroDivisionError), reports.memory_advice(BatchConfig(), ModelConfig(), 1):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="shape"), reports.memory_advice(BatchConfig(), ModelConfig(), 1):
        raise RuntimeError("shape mismatch")
