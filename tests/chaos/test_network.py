"""Scenarios 9, 10, 12 and 13: a network that fails, stalls, refuses or is away; the real client through the proxy."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import DataConfig, StorageConfig
from pretrain.npz import read_npz
from pretrain.shards import fetch_shards
from pretrain.storage import open_store
from tests.chaos.chain import INTERVAL, OPTIONS, STEPS, Chain, commits_of, damaged_steps
from tests.chaos.score import REPETITIONS, SEED, Score
from tests.fault_proxy import FaultProxy
from tests.runs import VOCAB_SIZE, Ended, make_shards, store_of, train

N_SHARDS = 200
LISTING, DESCRIBE, DOWNLOAD, UPLOAD = r"GET \S+/o\?", r"GET /storage\S+/o/", "GET /download", "POST /upload"
QUICK = StorageConfig(deadline_s=120.0, timeout_s=60.0, max_backoff_s=0.01)
STALL_SEEN_S = 10.0  # beside other work
MANY_TRIES = 16  # 0.3 ** 16: of 400 requests not one should ever need as many
KEEPS_ALL = ("--checkpoint.keep", "0", "--checkpoint.max_waiting", "99")


def error_line(ended: Ended, code: int, *words: str) -> None:
    """It ended with this code, and with one line that holds these words."""
    assert ended.code == code and "Traceback" not in ended.output, ended.output
    assert len(ended.errors) == 1 and all(word in ended.errors[0] for word in words), ended.output


def upload_shards(folder: Path, url: str) -> None:
    store = store_of(url)
    for path in sorted((folder / "shards").iterdir()):
        store.upload(path, path.name)


# ---- 9. 30 % of all requests fail ----


@pytest.mark.chaos(9)
def test_no_byte_is_wrong_where_a_third_of_the_requests_fails(tmp_path, bucket_url, fault_proxy, score):
    shards = make_shards(tmp_path / "shards", N_SHARDS, tokens_each=300)
    upload_shards(tmp_path, bucket_url)
    fault_proxy.clear()
    fault_proxy.inject("503|500|429|408|reset", "GET", times=-1, share=0.3, seed=SEED)
    store = open_store(bucket_url, QUICK)
    found = fetch_shards(store, DataConfig(cache_dir=str(tmp_path / "cache")), vocab_size=VOCAB_SIZE)
    fault_proxy_requests, broken = Counter(fault_proxy.requests), Counter(fault_proxy.broken)
    wrong = [s.name for s in found.shards if not np.array_equal(s.tokens(), read_npz(shards / s.name)[0])]
    score.equal("shards_right", len(found.shards) - len(wrong), N_SHARDS, "shards", wrong)
    score.count("requests", len(fault_proxy.requests), "requests")
    score.count("requests_failed", len(fault_proxy.broken), "requests")
    assert len(fault_proxy.broken) > 0.2 * len(fault_proxy.requests)
    # One layer of retry: a request is repeated as often as it failed, and no more.
    extra = {
        request: n - broken[request] - 1 for request, n in fault_proxy_requests.items() if n != broken[request] + 1
    }
    score.equal("needless_repeats", len(extra), 0, "requests", extra)
    score.at_most("attempts", max(fault_proxy_requests.values()), MANY_TRIES, "tries of one request")


# ---- 10. a stall ----


@pytest.mark.chaos(10)
@pytest.mark.parametrize("fault", ["stall", "stall-midway"])
@pytest.mark.parametrize(("action", "match"), [("list", LISTING), ("download", DOWNLOAD), ("upload", UPLOAD)])
def test_a_stalled_transfer_is_seen_soon_after_the_timeout(
    tmp_path, bucket_url, fault_proxy: FaultProxy, score: Score, action, match, fault
):
    timeout_s, content = 1.0, os.urandom(300_000)
    store = open_store(bucket_url, StorageConfig(deadline_s=120.0, timeout_s=timeout_s, max_backoff_s=0.001))
    store.create("there", content)
    (tmp_path / "file").write_bytes(content)
    actions: dict[str, Callable[[], object]] = {
        "list": store.list,
        "download": lambda: store.download("there", tmp_path / "copy"),
        "upload": lambda: store.upload(tmp_path / "file", "new"),
    }
    fault_proxy.clear()
    fault_proxy.inject(fault, match)
    began = time.monotonic()
    actions[action]()
    score.at_most("seen_after_timeout", round(time.monotonic() - began - timeout_s, 2), STALL_SEEN_S, "s")
    assert fault_proxy.count(match) >= 2 and fault_proxy.pending() == 0  # more where this machine was slow itself
    assert store.read_bytes("new" if action == "upload" else "there") == content
    if action == "download":
        assert (tmp_path / "copy").read_bytes() == content


# ---- 12. refused ----


@pytest.mark.chaos(12)
@pytest.mark.parametrize(
    "after",
    # test_faults.py meets a bucket that is closed from the start in the ordinary suite
    [pytest.param(0, id="at-start", marks=pytest.mark.slow), pytest.param(4, id="in-the-middle")],
)
def test_a_refused_download_ends_the_start_at_once_with_the_mend(folder, bucket_url, fault_proxy, score, after):
    upload_shards(folder, bucket_url)
    fault_proxy.clear()
    fault_proxy.inject("403", "GET", times=-1, skip=after)
    ended = train(folder, "--data", bucket_url)
    error_line(ended, 4, "lacks storage.objects.", "add-iam-policy-binding", "roles/storage.objectViewer")
    asked = Counter(fault_proxy.broken)
    score.equal("refusals_asked_again", sum(n - 1 for n in asked.values()), 0, "requests", asked)
    assert asked and not any((folder / "checkpoints").rglob("checkpoint-*"))


@pytest.mark.chaos(12)
def test_uploads_refused_in_the_middle_stay_here_until_they_are_allowed(
    folder, bucket_url, fault_proxy, baseline, score
):
    options = (*OPTIONS, *KEEPS_ALL, "--log.upload", "false")  # copies of the logs would be counted, too
    chain = Chain(folder, options, bucket_url)
    fault_proxy.inject("403", UPLOAD, times=-1, skip=30)
    with chain.start() as training:
        refused = training.wait()
    error_line(refused, 4, f"checkpoint-epoch1-step{STEPS}-", "did not reach", "--resume auto")
    assert "lacks storage.objects.create" in refused.output and "roles/storage.objectUser" in refused.output
    every = list(range(INTERVAL, STEPS + 1, INTERVAL))
    there = sorted(commits_of(bucket_url))
    assert 0 < len(there) < len(every) and damaged_steps(bucket_url) == []
    fault_proxy.clear()
    chain.interrupted()
    chain.finish()
    score.count("uploads_made_up_for", len(every) - len(there), "checkpoints")
    score.equal("commits", len(commits_of(bucket_url)), len(every), "checkpoints")
    chain.check_resumed(score, 0)
    chain.compare(baseline(*OPTIONS), score)


# ---- 13. away ----


@pytest.mark.chaos(13)
@pytest.mark.parametrize(
    "away_s",
    [
        pytest.param(3.0, id="few"),
        pytest.param(
            6.0 * REPETITIONS, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(300 + 8 * REPETITIONS)]
        ),
    ],
)
def test_training_goes_on_while_the_bucket_is_away_and_nothing_is_lost(
    folder, bucket_url, fault_proxy: FaultProxy, score: Score, away_s
):
    # Minutes of training: steps of some 0.1 s, a save every few seconds, more of them than wait here for the bucket.
    every_steps = 20
    options: tuple[str, ...] = (
        "--max-steps",
        "1000000",
        "--batch.global_size",
        "64",
        "--checkpoint.every_steps",
        str(every_steps),
    )
    options += ("--storage.max_backoff_s", "1", "--storage.timeout_s", "5")
    chain = Chain(folder, options, bucket_url)
    with chain.start() as training:
        training.until(lambda: commits_of(bucket_url), "a first commit")
        fault_proxy.inject("503|reset", times=-1, seed=SEED)
        began, before = time.monotonic(), chain.step
        training.until(lambda: time.monotonic() - began > away_s and chain.step > before + 2 * every_steps)
        seconds, after = time.monotonic() - began, chain.step
        fault_proxy.clear()
        training.signal(signal.SIGTERM)
        ended = training.wait()
    assert ended.code == 75, ended.output
    score.count("seconds_away", round(seconds), "s")
    score.count("steps_meanwhile", after - before, "steps")
    lost = chain.step - max(commits_of(bucket_url))
    score.equal("steps_lost", lost, 0, "steps", ended.output)
    score.equal("damaged_commits", len(damaged_steps(bucket_url)), 0, "checkpoints")
    # Saves that fell due meanwhile made nobody wait: the longest pause between two steps stays far below the outage.
    times = [line["time"] for line in chain.lines() if before < line["step"] <= after]
    pause = max(later - earlier for earlier, later in itertools.pairwise(times))
    score.at_most("longest_pause", round(pause, 2), max(seconds / 2, 10), "s")
    assert not re.search("stays local", ended.output), ended.output
