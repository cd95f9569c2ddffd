from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from pretrain import telemetry as module
from pretrain.config import EngineConfig, LogConfig, OptimConfig
from pretrain.engine.native import NativeEngine
from pretrain.profiling import StepProfiler
from pretrain.telemetry import NoTelemetry, open_telemetry
from tests.unit.test_power import rows

CPU = torch.device("cpu")


class Tiny(torch.nn.Module):
    """A model of one matrix, with the loss as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Embedding(50, 50)

    def forward(self, inputs, targets):
        return torch.nn.functional.cross_entropy(self.matrix(inputs).flatten(0, 1), targets.flatten())


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return NativeEngine(Tiny(), OptimConfig(), EngineConfig(name="native"), "fp32", CPU, 1)


def batches(count: int = 2) -> list[torch.Tensor]:
    return [torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(number)) for number in range(count)]


def open_here(tmp_path, config: LogConfig | None = None, rank: int = 0, local_rank: int = 0):
    return open_telemetry(replace(config or LogConfig(), dir=str(tmp_path)), "run", CPU, rank, local_rank, 2)


def step(telemetry, engine, number: int) -> None:
    telemetry.begin_step(number)
    with telemetry.phase("data_wait"):
        tokens = batches()
    engine.train_step(tokens, 1e-3)


def test_the_phases_of_a_step_are_told_per_step_and_what_is_between_steps_in_all(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(module, "CpuSensors", lambda: type("Unknown", (), {"read": lambda self: []})())
    with open_here(tmp_path) as telemetry:
        engine.mark = telemetry.mark
        for number in (1, 2):
            step(telemetry, engine, number)
        with telemetry.phase("eval"):
            engine.evaluate(batches()[0])
        figures = telemetry.figures()
        step(telemetry, engine, 3)
        later = telemetry.figures()
    in_a_step = {"data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "host_memory_gb"}
    assert set(figures) == in_a_step | {"eval_ms"} and set(later) == in_a_step
    assert all(value > 0 for value in figures.values())
    assert figures["host_memory_gb"] == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.2)


def test_only_the_first_rank_of_a_node_reads_devices_and_each_node_has_its_file(tmp_path):
    for rank, local_rank in ((0, 0), (1, 1), (2, 0)):
        telemetry = open_here(tmp_path, rank=rank, local_rank=local_rank)
        assert (telemetry.energy_j is not None or "cpu_utilization" in telemetry.figures()) == (local_rank == 0)
        telemetry.close()
        telemetry.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["power-rank2.csv", "power.csv"]
    assert len(rows(tmp_path / "run")) >= 2


def test_switched_off_it_measures_nothing_and_leaves_nothing(tmp_path, engine):
    with open_here(tmp_path, LogConfig(telemetry=False)) as telemetry:
        assert isinstance(telemetry, NoTelemetry)
        engine.mark = telemetry.mark
        step(telemetry, engine, 1)
        assert telemetry.figures() == {} and telemetry.energy_j is None
    assert list(tmp_path.iterdir()) == []


def test_telemetry_changes_no_bit_of_the_training(tmp_path, engine):
    results = []
    for config in (LogConfig(profile="2:2"), LogConfig(telemetry=False)):
        torch.manual_seed(0)
        engine = NativeEngine(Tiny(), OptimConfig(), EngineConfig(name="native"), "fp32", CPU, 1)
        with open_here(tmp_path, config) as telemetry:
            engine.mark = telemetry.mark
            for number in (1, 2, 3):
                step(telemetry, engine, number)
        results.append({name: state["exp_avg_sq"].clone() for name, state in engine.parameter_states()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def ranges_of(path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    phases = ("data_wait", "forward", "backward", "optimizer", "other")
    found = [event for event in events if event.get("name") in phases and event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_a_profile_holds_its_steps_and_their_phases_and_says_where_it_is(tmp_path, engine, caplog):
    caplog.set_level("INFO")
    with open_here(tmp_path, LogConfig(profile="2:3")) as telemetry:
        engine.mark = telemetry.mark
        for number in range(1, 6):
            step(telemetry, engine, number)
            if number == 4:
                trace = tmp_path / "run" / "trace-steps2-3.json"
                assert trace.exists(), "it is written as soon as its steps are over"
    one = ["data_wait", "other", "forward", "backward", "forward", "backward", "optimizer", "other"]
    assert ranges_of(trace) == one * 2
    assert str(trace) in caplog.text


def test_a_profile_is_rank_0s_and_one_cut_short_is_written_too(tmp_path, engine):
    with open_here(tmp_path, LogConfig(profile="1:9"), rank=1, local_rank=1) as telemetry:
        step(telemetry, engine, 1)
    assert not list(tmp_path.glob("run/trace*"))
    with open_here(tmp_path, LogConfig(profile="1:9")) as telemetry:
        step(telemetry, engine, 1)
    assert list(tmp_path.glob("run/trace-steps1-9.json"))


def test_a_profile_of_steps_that_are_done_already_says_so(tmp_path, caplog):
    profiler = StepProfiler(range(3, 5), tmp_path)
    for number in (6, 7):
        profiler.before_step(number)
    profiler.finish()
    assert [line for line in caplog.messages if "no trace" in line] == [
        "no trace: step 4 is done already (log.profile)"
    ]
    late = StepProfiler(range(3, 5), tmp_path)
    late.before_step(4)
    assert late.is_active and "begins with step 4" in caplog.text
    late.finish()


def test_a_kill_while_a_trace_is_written_leaves_none_that_is_torn(tmp_path, monkeypatch):
    def killed(profiler, path):
        Path(path).write_text('{"traceEvents": [')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", killed)
    profiler = StepProfiler(range(1, 2), tmp_path)
    profiler.before_step(1)
    with pytest.raises(KeyboardInterrupt):
        profiler.finish()
    assert not list(tmp_path.glob("trace*"))


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    profiler = StepProfiler(range(1, 2), tmp_path / "missing")
    profiler.before_step(1)
    profiler.finish()
    assert not profiler.is_active and not (tmp_path / "missing").exists()


def test_without_the_driver_a_gpu_run_goes_on_and_says_why_there_are_no_figures(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # a launcher may say more ranks than there are GPUs

    class NoDriver:
        problem = "the NVIDIA driver can't be asked about its GPUs: Driver Not Loaded"

        def __init__(self, devices) -> None:
            self.read = list
            assert [device.index for device in devices] == [0, 1]

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, end) -> float:
            return 20.0

    class Nvtx:
        pushed: list[str] = []  # noqa: RUF012
        range_push = pushed.append

        @staticmethod
        def range_pop() -> None:
            pass

    monkeypatch.setattr(module, "GpuSensors", NoDriver)
    monkeypatch.setattr(module, "cuda_event", Event)
    monkeypatch.setattr(torch.cuda, "nvtx", Nvtx)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7_000_000_000)
    config = LogConfig(dir=str(tmp_path))
    with open_telemetry(config, "run", torch.device("cuda", 0), 0, 0, 16) as telemetry:
        telemetry.begin_step(1)
        with telemetry.phase("data_wait"):
            pass
        for phase in ("forward", "backward", "optimizer", "other"):
            telemetry.mark(phase)
        figures = telemetry.figures()
        assert telemetry.energy_j is None
    assert "Driver Not Loaded" in caplog.text
    assert Nvtx.pushed == ["data_wait", "other", "forward", "backward", "optimizer", "other"]
    assert figures["gpu_memory_peak_gb"] == 7.0 and not {"power_w", "gpu_utilization"} & set(figures)
    told = [figures[name] for name in ("forward_ms", "backward_ms", "optimizer_ms")]
    assert told == pytest.approx([20.0, 0.0, 0.0])
    assert all(row.split(",")[3] == "cpu" for row in rows(tmp_path / "run")[1:])
