from __future__ import annotations

import builtins
import sys
from types import SimpleNamespace

import pytest

from pretrain.config import LogConfig
from pretrain.errors import ConfigError
from pretrain.ledger import Ledger
from pretrain.metrics import open_metrics
from pretrain.sinks import TensorBoardSink, WandbSink, has_wandb_key, tag
from tests.displays import read_tensorboard

RECORD = {"step": 3, "time": 50.0, "loss": 2.5, "mfu": 0.4, "val_loss": 3.0, "gpu_power_w": 310.0, "note": "warm"}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("loss", "train/loss"),
        ("grad_norm", "train/grad_norm"),
        ("tokens", "train/tokens"),
        ("tokens_per_second", "perf/tokens_per_second"),
        ("data_wait_ms", "perf/data_wait_ms"),
        ("mfu", "perf/mfu"),
        ("mfu_causal", "perf/mfu_causal"),
        ("eval_ms", "perf/eval_ms"),
        ("power_w", "system/power_w"),
        ("energy_j_per_token", "system/energy_j_per_token"),
        ("cpu_utilization", "system/cpu_utilization"),
        ("host_memory_gb", "system/host_memory_gb"),
        ("gpu_utilization", "system/gpu_utilization"),
        ("val_loss", "val/loss"),
    ],
)
def test_each_field_has_its_chart(field, expected):
    assert tag(field) == expected


def test_tensorboard_hides_the_points_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("torch")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, loss in ((0, 1.0), (2, 2.0)):
        sink = TensorBoardSink(tmp_path, {"lr": 1e-3}, first_step)
        for step in range(first_step + 1, 4):
            sink.write(RECORD | {"step": step, "loss": loss})
        sink.event("checkpoint_committed", {"step": 3})
        sink.summary({"steps": 3})
        sink.close()
    charts = EventAccumulator(str(tmp_path))
    charts.Reload()
    assert [(point.step, point.value) for point in charts.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert charts.Scalars("val/loss")[-1].wall_time == 50.0
    assert sorted(charts.Tags()["scalars"]) == ["perf/mfu", "system/gpu_power_w", "train/loss", "val/loss"]


def test_tensorboard_hides_what_a_run_killed_before_its_first_checkpoint_has_shown(tmp_path):
    for last, loss in ((5, 1.0), (3, 2.0)):
        sink = TensorBoardSink(tmp_path, {"lr": loss}, 0)
        for step in range(1, last + 1):
            sink.write(RECORD | {"step": step, "loss": loss})
            sink.event("sample", SAMPLE | {"step": step})
        sink.close()
    view = read_tensorboard(tmp_path)
    assert view.points["train/loss"] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert [step for step, _ in view.texts["sample"]] == [1, 2, 3]
    ((_, settings),) = view.texts["settings"]
    assert "2.0" in settings


class FakeWandb:
    """What WandbSink uses of wandb; `fail` names the calls that raise."""

    def __init__(self, *fail: str) -> None:
        self.fail = set(fail)
        self.starts: list[dict] = []
        self.logged: list[dict] = []
        self.finished = self.torn_down = 0
        self.summary = SimpleNamespace(update=lambda fields: self._called("summary"))

    def _called(self, name: str) -> None:
        if name in self.fail:
            raise ConnectionError(f"{name}: no route")

    def Settings(self, **settings):
        return settings

    def Table(self, columns, data):
        return SimpleNamespace(columns=columns, data=data)

    def init(self, **options):
        self.starts.append(options)
        self._called(f"init {options['mode']}")
        self.offline = options["mode"] == "offline"
        return self

    def teardown(self):
        self.torn_down += 1

    def define_metric(self, *args, **options):
        pass

    def log(self, fields):
        self._called("log")
        self.logged.append(fields)

    def finish(self):
        self._called("finish")
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    def install(*fail: str) -> FakeWandb:
        fake = FakeWandb(*fail)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return install


def open_wandb(folder, first_step: int = 0) -> WandbSink:
    return WandbSink(folder, "project", "run", {"lr": 1}, first_step)


def test_wandb_is_offline_without_a_key_and_online_with_one(wandb, tmp_path, monkeypatch):
    fake = wandb()
    open_wandb(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    open_wandb(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    open_wandb(tmp_path)
    assert [start["mode"] for start in fake.starts] == ["offline", "online", "offline"]
    assert fake.starts[1]["resume"] == "allow"


def test_a_key_is_found_in_netrc_for_the_host_in_use(wandb, tmp_path, monkeypatch):
    wandb()
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()


def test_a_resumed_run_is_the_same_wandb_run_and_a_fresh_one_is_not(wandb, tmp_path):
    fake = wandb()
    for first_step in (0, 5, 0):
        open_wandb(tmp_path, first_step)
    first, resumed, fresh = (start["id"] for start in fake.starts)
    assert first == resumed != fresh
    assert (tmp_path / "wandb_run_id").read_text().strip() == fresh


def test_on_another_machine_a_resumed_run_is_the_wandb_run_that_its_checkpoint_names(wandb, tmp_path):
    fake = wandb()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = open_wandb(tmp_path / "one")
    resumed = WandbSink(tmp_path / "two", "project", "run", {}, 5, 5, first.run_id)
    afresh = WandbSink(tmp_path / "two", "project", "run", {}, 0, 0, "")
    ids = [start["id"] for start in fake.starts]
    assert ids == [first.run_id, first.run_id, afresh.run_id] and afresh.run_id != first.run_id
    assert resumed.run_id == first.run_id


def test_wandb_gets_the_charts_with_the_step_as_a_field(wandb, tmp_path):
    fake = wandb()
    sink = open_wandb(tmp_path)
    sink.write(RECORD)
    sink.close()
    sink.close()
    assert fake.logged == [
        {"step": 3, "train/loss": 2.5, "perf/mfu": 0.4, "val/loss": 3.0, "system/gpu_power_w": 310.0}
    ]
    assert fake.finished == 1


def test_wandb_is_sent_no_step_and_no_sample_twice(wandb, tmp_path):
    fake = wandb()
    open_wandb(tmp_path)  # the run that is resumed
    sink = WandbSink(tmp_path, "project", "run", {}, 5, 7)
    for step in (6, 7, 8, 9, 7, 8, 9, 10):  # steps 6 and 7 were shown before, 7 to 9 are taken again after a roll-back
        sink.write(RECORD | {"step": step})
        sink.event("sample", SAMPLE | {"step": step})
    assert [fields["step"] for fields in fake.logged if "sample" not in fields] == [8, 9, 10]
    assert [fields["step"] for fields in fake.logged if "sample" in fields] == [8, 9, 10]
    fake.logged.clear()
    WandbSink(tmp_path, "project", "run", {}, 0, 7).write(RECORD)  # a fresh run is another one to W&B
    assert [fields["step"] for fields in fake.logged] == [3]


@pytest.mark.parametrize("carried_step", ["furthest_step", "step"], ids=["", "of a version without it"])
def test_a_run_on_another_machine_sends_no_step_twice_and_carries_its_id_on(wandb, tmp_path, carried_step):
    fake = wandb()
    ledger = Ledger()
    ledger.event("started", 1.0, {"step": 0})
    carried = {**ledger.totals(50.0), "step": 7, "tokens": 70, "wandb_run_id": "abc"}
    del carried["furthest_step"]
    carried[carried_step] = 9 if carried_step == "furthest_step" else 7
    config = LogConfig(dir=str(tmp_path), tensorboard=False, wandb=True)
    how = {"settings": {}, "total_steps": 20, "first_step": 7, "rank": 0, "carried": carried}
    with open_metrics(config, "run", **how) as metrics:
        for step in (8, 9, 10):
            metrics.record({"step": step, "loss": 1.0})
    assert fake.starts[0]["id"] == metrics.wandb_run_id == "abc"
    assert [fields["step"] for fields in fake.logged] == ([10] if carried_step == "furthest_step" else [8, 9, 10])


def test_a_server_out_of_reach_means_offline(wandb, tmp_path, monkeypatch):
    fake = wandb("init online")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    sink = open_wandb(tmp_path)
    sink.write(RECORD)
    assert [start["mode"] for start in fake.starts] == ["online", "offline"]
    assert fake.torn_down == 1
    assert len(fake.logged) == 1


@pytest.mark.parametrize("fail", ["log", "summary", "finish", "init offline"])
def test_wandb_trouble_never_stops_the_training(wandb, tmp_path, fail):
    fake = wandb(fail)
    sink = open_wandb(tmp_path)
    sink.write(RECORD)
    sink.write(RECORD | {"step": 4})
    sink.summary({"steps": 3})
    sink.close()
    assert len(fake.logged) == (0 if fail in ("log", "init offline") else 2)


@pytest.mark.parametrize(
    ("module", "make", "switch"),
    [("wandb", open_wandb, "--no-wandb"), ("torch.utils", lambda f: TensorBoardSink(f, {}, 0), "--no-tensorboard")],
)
def test_a_missing_package_is_a_config_error_with_its_switch(tmp_path, monkeypatch, module, make, switch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if name.startswith(module):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=switch):
        make(tmp_path)


SAMPLE = {"step": 3, "prompt": "Once", "text": " upon\na time"}


def test_wandb_gets_samples_as_a_table(wandb, tmp_path):
    fake = wandb()
    sink = open_wandb(tmp_path)
    sink.event("sample", SAMPLE)
    sink.event("checkpoint_saved", {"step": 3, "name": "n"})
    (logged,) = fake.logged
    assert logged["step"] == 3 and logged["sample"].data == [[3, "Once", " upon\na time"]]


def test_tensorboard_shows_a_sample_as_text_and_takes_back_what_a_roll_back_abandons(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, {}, 0)
    for step in (1, 2, 3):
        sink.write({"step": step, "time": 1.0 * step, "loss": 9.0})
    sink.event("sample", SAMPLE)
    sink.event("rolled_back", {"step": 1, "reason": "spike"})
    sink.write({"step": 2, "time": 5.0, "loss": 8.0})
    sink.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(point.step, point.value) for point in found.Scalars("train/loss")] == [(1, 9.0), (2, 8.0)]
    assert "sample/text_summary" in found.Tags()["tensors"]
