"""DeepSpeed's memory as it really is: two ranks on a CPU train, and torch's profiler traces every allocation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pretrain.engine import zero
from tests.helpers_training import run_two_ranks

MEASURE = """
import gc
from torch.profiler import ProfilerActivity, profile
from pretrain import memory, plan
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.model_config import ModelConfig
from pretrain.engine import zero
from pretrain.engine.ds_settings import deepspeed_settings
from model import GPT

file, stage, micro, steps, length = sys.argv[1], *map(int, sys.argv[2:])
zero.prepare_import(torch.device("cpu"))
shape = dict(n_layer=6, n_head=8, d_model=512, vocab_size=3000, seq_len=length, dropout=0.0)
model = ModelConfig(size="custom", **shape).resolve()
batch, optim = BatchConfig(micro * steps * 2, micro), OptimConfig()
engine = EngineConfig(zero_stage=stage, ds_config=file)
settings, problems = deepspeed_settings(engine, optim, batch, "bf16", 2)
assert not problems, problems
trained = zero.ZeroEngine(GPT(model, "sdpa"), settings, optim, torch.device("cpu"))
tokens = [torch.zeros(micro, length + 1, dtype=torch.int64) for _ in range(steps)]
trained.train_step(tokens, 1e-4)
gc.collect()
storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in
            (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"}
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
    trained.train_step(tokens, 1e-4)
events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
alive = highest = sum(storages.values())
for event in sorted(events, key=lambda event: event.start_ns()):
    alive += event.nbytes()
    highest = max(highest, alive)
predicted = memory.peak(plan.make_setup(model, batch, engine, optim, "bf16", 2))
print(json.dumps([highest, predicted.total, predicted.when]))
"""


@pytest.fixture(scope="module", autouse=True)
def _deepspeed_runs_here():
    before = dict(os.environ)  # DeepSpeed's import sets some; other tests must not inherit them
    zero.prepare_import(torch.device("cpu"))
    problem = zero.cpu_op_problem()
    os.environ.clear()
    os.environ.update(before)
    if problem:
        pytest.skip(problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "micro", "steps", "length", "fullest"),
    [(2, 4, 1, 256, "the loss, backward"), (2, 1, 2, 64, "the update"), (1, 1, 2, 64, "the update")],
)
def test_the_predicted_peak_is_what_deepspeed_allocates(tmp_path: Path, stage, micro, steps, length, fullest):
    zero_settings = {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1_000_000,
    }
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps({"zero_optimization": zero_settings}))
    measured, predicted, when = run_two_ranks(
        MEASURE, arguments=(str(file), str(stage), str(micro), str(steps), str(length))
    )[0]
    assert when == fullest
    assert predicted == pytest.approx(measured, rel=0.07)
