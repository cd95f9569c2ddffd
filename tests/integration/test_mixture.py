"""A run on two sources with documents kept apart: real processes, killed, on two ranks, and rolled back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.document_mask import DocumentMask
from pretrain.pretrained import load_pretrained
from tests.runs import (
    ROOT,
    RUN,
    TrainingProcess,
    differing,
    final_state,
    losses,
    make_shards,
    metrics,
    plain_environment,
    train,
)

MIXTURE = "[{source: web, weight: 0.7}, {source: more/code, weight: 0.3}]"
MASKED = ("--data.document_mask", "true", "--data.eot_token_id", "5")
SAVED = ("--checkpoint.every_steps", "6", "--max-steps", "40", "--resume", "auto")
OPTIONS = ("--data.sources", MIXTURE, *MASKED, *SAVED)
GLOBAL_SIZE, WINDOW = 8, 32


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A machine's disk with both sources; of code there are 31 windows, so it is seen three times."""

    def make(name: str):
        folder = tmp_path_factory.mktemp(name)
        make_shards(folder / "web")
        make_shards(folder / "more" / "code", n_shards=2, tokens_each=500, seed=3)
        return folder

    return make


@pytest.fixture(scope="module")
def alone(disk):
    """A run left alone: its folder, and how it ended."""
    folder = disk("alone")
    ended = train(folder, *OPTIONS)
    assert ended.code == 0, ended.output
    return folder, ended


def test_a_killed_run_takes_the_windows_it_would_have_taken(disk, alone):
    folder = disk("killed")
    with TrainingProcess(folder, *OPTIONS) as training:
        training.until_step(15)
        training.kill()
    resumed = train(folder, *OPTIONS)
    assert resumed.code == 0 and "MixturePosition(" in resumed.output, resumed.output
    assert losses(folder) == losses(alone[0]) and len(losses(folder)) == 40
    assert differing(final_state(folder), final_state(alone[0])) == []


@pytest.mark.slow  # tests/unit/test_mixture.py holds how the ranks split a step
def test_two_ranks_take_the_same_windows_together(disk, alone):
    folder = disk("two-ranks")
    ended = train(folder, *OPTIONS, "--model.dropout", "0", "--max-steps", "10", ranks=2)
    one = disk("one-rank")
    assert ended.code == 0, ended.output
    assert train(one, *OPTIONS, "--model.dropout", "0", "--max-steps", "10").code == 0
    for step, measured in losses(folder).items():
        assert measured == pytest.approx(losses(one)[step], rel=1e-5)


def test_the_shares_are_in_the_log_the_metrics_and_the_summary(alone):
    folder, ended = alone
    for record in metrics(folder):
        windows = record["step"] * GLOBAL_SIZE
        assert record["tokens/code"] + record["tokens/web"] == record["tokens"] == windows * WINDOW
        assert abs(record["tokens/code"] / WINDOW - 0.3 * windows) < 1
        assert record["share/code"] == record["tokens/code"] / record["tokens"]
    assert "source code: 30.00% of the windows, 31 of its own, so about 3.10 epochs by step 40" in ended.output
    summary = json.loads((folder / "logs" / RUN / "summary.json").read_text())
    assert (summary["tokens/code"], summary["share/web"]) == (96 * WINDOW, 0.7)
    assert "share/code" in ended.output.partition("tokens/s  ")[2]  # in the table at the end
    assert "attention by the document mask by torch's fused attention" in ended.output


def look_up(folder: Path, step: int) -> dict[str, Any]:
    """What inspect_data.py says of a step."""
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), "--step", str(step), "--run", RUN, "--json"]
    found = subprocess.run(command, cwd=folder, env=plain_environment(), capture_output=True, text=True, check=True)
    tree: dict[str, Any] = json.loads(found.stdout)
    return tree


def test_a_step_is_looked_up_with_the_source_of_each_window(alone):
    tree = look_up(alone[0], 9)
    sources = [shard["name"].split("/")[0] for shard in tree["shards"]]
    assert tree["position"]["window"] == 64 and set(sources) == {"web", "code"}
    given = [window["parts"][0]["shard"].split("/")[0] for window in tree["windows"]]
    assert (len(given) == GLOBAL_SIZE and given.count("code") == 3) or given.count("code") == 2


def test_the_checkpoint_says_how_its_documents_were_kept_apart(alone):
    place = str(alone[0] / "checkpoints" / RUN)
    packed, single = (
        load_pretrained(place, device=torch.device("cpu"), dtype=torch.float32, packed=packed).model
        for packed in (True, False)
    )
    assert packed.documents == DocumentMask("sdpa", 5) and single.documents is None
    tokens = torch.tensor([[9, 8, 5, 7, 6, 5, 11]])
    assert torch.allclose(packed(tokens)[:, 3:6], single(tokens[:, 3:6]), atol=1e-5)
    assert not torch.allclose(packed(tokens)[:, 3:6], single(tokens)[:, 3:6], atol=1e-5)


def test_another_mixture_is_refused_with_the_difference(alone):
    other = MIXTURE.replace("0.3", "0.1")
    ended = train(alone[0], *OPTIONS, "--data.sources", other, "--max-steps", "50")
    assert ended.code == 5 and "source code had a share of 3/10 and has 1/8" in ended.output, ended.output


def test_a_roll_back_passes_over_the_windows_of_every_source(disk):
    folder = disk("rolled-back")
    environment = plain_environment(PRETRAIN_FAILPOINT="loss.poison:33-44:poison")  # four a step: steps 9 to 11
    ended = train(folder, *OPTIONS, "--train.max_skipped", "2", "--max-steps", "24", environment=environment)
    assert ended.code == 0, ended.output
    events = map(json.loads, (folder / "logs" / RUN / "events.jsonl").read_text().splitlines())
    (passed_over,) = [event for event in events if event["kind"] == "rolled_back"]
    assert (passed_over["from_step"], passed_over["to_step"], passed_over["windows"]) == (11, 6, 40)
    assert {shard.split("/")[0] for shard in passed_over["shards"]} == {"web", "code"}
    last = metrics(folder)[-1]
    assert last["tokens"] == 24 * GLOBAL_SIZE * WINDOW
    assert last["tokens/code"] + last["tokens/web"] == 29 * GLOBAL_SIZE * WINDOW  # read, not all of it trained on
    assert look_up(folder, 9)["position"]["window"] == 13 * GLOBAL_SIZE
