"""What a start must not import: found in a process of its own, since this one has long imported it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pretrain.engine import lean
from tests.runs import ROOT, plain_environment

STEP = """
    import sys
    import torch
    from model import GPT
    from pretrain.config import BatchConfig, EngineConfig, OptimConfig
    from pretrain.engine.build import build_engine
    from pretrain.model_config import ModelConfig
    from pretrain.pretrained import first_weights
    from pretrain.ranks import join, leave
    from pretrain.reports import end_at_once

    cpu, me = torch.device("cpu"), join(torch.device("cpu"), 1)
    optim, batch = OptimConfig(lr=1e-2, warmup_steps=0), BatchConfig(global_size=4, micro_size=2)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 40, "seq_len": 12}
    shape = ModelConfig(size="custom", dropout=0.0, **sizes).resolve()
    with torch.device("meta"):
        model = GPT(shape, "sdpa")
    engine = build_engine(model, EngineConfig(name="NAME"), optim, batch, "bf16", cpu, me)
    engine.initialise(first_weights(shape, 0))
    tokens = torch.arange(4 * 13).view(4, 13) % 40
    losses = [float(engine.train_step(tokens.split(2), 1e-2).loss) for _ in range(4)]
    assert losses[-1] < losses[0], losses
    heavy = ("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy")
    print(engine.name, *[name for name in heavy if name in sys.modules])
    leave(me)
    end_at_once(0)
"""


@pytest.mark.parametrize("name", ["single", "deepspeed"])
def test_steps_that_are_not_compiled_import_nothing_of_the_compiler(name):
    code = textwrap.dedent(STEP).replace("NAME", name)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=plain_environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    engine, *heavy = ended.stdout.splitlines()[-1].split()
    if engine != name:
        pytest.skip("no C++ compiler for DeepSpeed's CPU op")
    assert heavy == []


def test_what_is_compiled_when_it_is_called_is_compiled_once():
    compiled = []

    def compile_now(*, mode):
        def decorate(function):
            compiled.append((function.__name__, mode))
            return lambda x: function(x) + 100

        return decorate

    @lean._compile_when_called(compile_now, mode="fast")
    def double(x):
        return 2 * x

    assert double.__name__ == "double" and compiled == []
    assert [double(1), double(2)] == [102, 104] and compiled == [("double", "fast")]
