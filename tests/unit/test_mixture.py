"""Sources mixed by weight: exact to the window over any stretch, and a function of the position alone."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pretrain.arguments import parse, to_yaml
from pretrain.batches import Batches, Position
from pretrain.cache import Shard
from pretrain.config import DataConfig, SourceConfig
from pretrain.errors import CheckpointError, ConfigError, ShardError
from pretrain.lookup import Saved, planned, recorded, windows_at, windows_before
from pretrain.manifest import DataManifest
from pretrain.mixture import (
    Mixture,
    MixturePosition,
    Schedule,
    alone,
    check_same_tokenizer,
    lay_out,
    position_from,
    shares,
)
from pretrain.progress import DataOrder
from pretrain.shards import ShardSet

SEQ_LEN, GLOBAL_SIZE = 8, 6
WEIGHTS = {"books": 0.25, "code": 0.15, "web": 0.6}
MANY = [9, 100, 5, 100, 5, 100, 100, 7, 100, 5, 3, 3, 9, 2]
LENGTHS = {"books": [70, 3, 41], "code": [25], "web": [90, 200, 95, 30]}  # of code, three windows: it is soon repeated


def shards_of(folder: Path, name: str) -> list[Shard]:
    """Shards whose tokens say which source and shard they are of, and where they lie in it."""
    found, source = [], sorted(LENGTHS).index(name)
    for index, n_tokens in enumerate(LENGTHS[name]):
        path = folder / f"{name}-{index}.bin"
        (np.arange(n_tokens, dtype="<u2") + 10_000 * source + 1000 * index).tofile(path)
        found.append(Shard(f"{index}.npz", n_tokens, path, "uint16", f"crc of {name} {index}"))
    return found


def make_mixture(folder: Path, weights: dict[str, float] = WEIGHTS, global_size: int = GLOBAL_SIZE) -> Mixture:
    sources = [(name, shards_of(folder, name)) for name in sorted(weights)]
    return Mixture(sources, weights, seq_len=SEQ_LEN, global_size=global_size, seed=5, shuffle_shards=2)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return make_mixture(tmp_path)


def walk(batches: Batches, steps: int) -> tuple[np.ndarray, list[Position]]:
    """The windows of so many steps, and the positions before, between and behind them."""
    positions, windows = [Position()], []
    for _ in range(steps):
        tokens, position = batches.take(positions[-1], 0, 1)
        windows.append(tokens)
        positions.append(position)
    return np.concatenate(windows), positions


# ---- the schedule ----


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [1, 1, 1],
        [0.9, *[0.01] * 10],
        [5, 4, 3, 2, 1, 0.5, 0.25],
        [0.333, 0.123456789, 0.01],
        [1, 1e-6],
        MANY,
        list(np.random.default_rng(0).random(12).round(4)),
    ],
    ids=str,
)
def test_a_source_is_never_a_whole_window_off_its_share(weights):
    parts = list(shares({f"{number:02}": float(weight) for number, weight in enumerate(weights)}).values())
    assert sum(parts) == 1
    schedule = Schedule(parts)
    chosen = schedule.after([0] * len(parts), 1000)
    given = np.cumsum(chosen[:, None] == np.arange(len(parts)), axis=0)  # (windows, sources)
    for windows in range(1, 1001):
        for count, part in zip(given[windows - 1].tolist(), parts, strict=True):
            assert abs(count - part * windows) < 1  # exact: these are fractions
    for begin in (1, 137, 999):  # and it goes on from any counts as if it had never stopped
        counts = given[begin - 1].tolist()
        assert schedule.counts(begin) == counts
        assert np.array_equal(schedule.after(counts, 1000 - begin), chosen[begin:])


def test_taking_the_source_that_lags_most_would_break_the_promise():
    """Why it is the deadline that decides."""
    parts = [Fraction(weight, sum(MANY)) for weight in MANY]
    counts, worst = [0] * len(parts), Fraction(0)
    for windows in range(1, 400):
        lags = [part * windows - count for part, count in zip(parts, counts, strict=True)]
        counts[lags.index(max(lags))] += 1
        worst = max(worst, *(abs(part * windows - count) for part, count in zip(parts, counts, strict=True)))
    assert worst > 1.3


def test_shares_are_of_the_decimals_as_written():
    assert shares({"a": 0.7, "b": 0.3}) == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert shares({"a": 1e-3, "b": 3}) == {"a": Fraction(1, 3001), "b": Fraction(3000, 3001)}
    schedule = Schedule([Fraction(7, 10), Fraction(3, 10)])
    assert schedule.counts(10**12 + 10) == [7 * 10**11 + 7, 3 * 10**11 + 3]  # far ahead is not gone through


# ---- the batches ----


def test_each_source_gives_its_own_windows_in_its_own_order_as_if_it_were_alone(mixture, tmp_path):
    steps = 60
    windows, positions = walk(mixture, steps)
    for number, name in enumerate(mixture.names):
        mine = windows[windows[:, 0] // 10_000 == number]
        share = Fraction(str(WEIGHTS[name]))
        assert abs(len(mine) - share * steps * GLOBAL_SIZE) < 1
        how = {"seq_len": SEQ_LEN, "global_size": 1, "seed": 5, "shuffle_shards": 2}
        by_itself = Batches(shards_of(tmp_path, name), **how)
        assert np.array_equal(mine, by_itself.read(0, len(mine)))
        assert mixture.windows_of(positions[-1])[name] == len(mine)
    assert mixture.files_processed(positions[-1]) == sum(
        source.files_processed(each) for source, each in zip(mixture.sources, positions[-1].sources, strict=True)
    )
    assert positions[-1].epoch == min(each.epoch for each in positions[-1].sources) >= 1
    assert positions[-1].window == steps * GLOBAL_SIZE


def test_other_sources_and_weights_change_nothing_in_a_sources_order(tmp_path):
    more = make_mixture(tmp_path)
    fewer = make_mixture(tmp_path, {"code": 1, "web": 4})
    web = [each[each[:, 0] // 10_000 == 2][:100] for each in (walk(more, 40)[0], walk(fewer, 40)[0])]
    assert len(web[0]) == len(web[1]) == 100 and np.array_equal(*web)


def test_ranks_split_the_windows_of_one(mixture):
    position = Position()
    for _ in range(20):
        whole, after = mixture.take(position, 0, 1)
        for ranks in (2, 3, 6):
            parts = [mixture.take(position, rank, ranks) for rank in range(ranks)]
            assert np.array_equal(np.concatenate([tokens for tokens, _ in parts]), whole)
            assert all(at == after for _, at in parts)
        position = after
    with pytest.raises(ValueError, match="can't split"):
        mixture.take(position, 0, 4)


def test_a_run_goes_on_from_any_position_that_json_has_kept(mixture, tmp_path):
    windows, positions = walk(mixture, 30)
    for step in (0, 1, 13, 29):
        saved = json.loads(json.dumps(dataclasses.asdict(positions[step])))
        again, position = make_mixture(tmp_path), position_from(saved)
        assert position == positions[step] and hash(position) == hash(positions[step])
        rest = np.concatenate([tokens for tokens, _ in zip_steps(again, position, 30 - step)])
        assert np.array_equal(rest, windows[step * GLOBAL_SIZE :])


def zip_steps(batches: Batches, position: Position, steps: int) -> list[tuple[np.ndarray, Position]]:
    found = []
    stream = batches.stream(position, 0, 1)
    for _ in range(steps):
        found.append(next(stream))
    stream.close()
    return found


def test_a_step_may_take_a_small_source_several_times_over(tmp_path):
    mixture = make_mixture(tmp_path, {"code": 9, "web": 1}, global_size=20)
    windows, positions = walk(mixture, 3)
    code = windows[windows[:, 0] // 10_000 == 1]  # three windows an epoch
    assert len(code) == 54 and positions[-1].sources[0] == Position(18, 0, 0)
    assert all(len({int(window[0]) for window in code[begin : begin + 3]}) == 3 for begin in range(0, 54, 3))


def test_positions_of_other_data_are_refused(mixture):
    with pytest.raises(ValueError, match="not one of a mixture of 3 sources"):
        mixture.take(Position(0, 0, 6), 0, 1)
    with pytest.raises(ValueError, match="not in an epoch"):
        mixture.take(MixturePosition(0, 0, 99, (Position(0, 9, 0),) * 3), 0, 1)
    assert position_from({"epoch": 1, "shard": 2, "window": 3}) == Position(1, 2, 3)
    with pytest.raises(TypeError):
        position_from({"epoch": 1, "sources": [{"elsewhere": 1}]})


def test_a_source_without_a_window_is_named(tmp_path):
    sources = [("code", shards_of(tmp_path, "code")), ("web", shards_of(tmp_path, "web")[:0])]
    with pytest.raises(ShardError, match="source web of the mixture has 0 tokens, no window of model"):
        Mixture(sources, {"code": 1, "web": 1}, seq_len=SEQ_LEN, global_size=2, seed=1)


def test_the_outlook_says_how_often_each_source_is_seen(mixture):
    (books, code, _) = mixture.outlook(100)
    assert books == "source books: 25.00% of the windows, 14 of its own, so about 10.71 epochs by step 100"
    assert "3 of its own, so about 30.00 epochs" in code


# ---- looking up ----


def test_look_up_names_the_windows_that_training_takes(mixture):
    _, positions = walk(mixture, 12)
    for step, position in enumerate(positions[:-1], 1):
        assert planned(mixture, step) == position or step == 1
        windows = windows_at(mixture, position)
        assert np.array_equal([window.tokens() for window in windows], mixture.take(position, 0, 1)[0])
        assert [window.source for window in windows] == [
            mixture.names[window.tokens()[0] // 10_000] for window in windows
        ]
        assert windows_before(mixture, position) == (step - 1) * GLOBAL_SIZE
    newest = Saved.from_state({"progress": {"step": 12, "position": dataclasses.asdict(positions[12])}}, "newest")
    assert recorded(mixture, 7, newest) == positions[6]


def test_the_shards_of_a_stretch_are_named_with_their_source(mixture):
    _, positions = walk(mixture, 5)
    between = mixture.shards_between(positions[2], positions[4])
    taken = {
        f"{window.source}/{window.parts[0].shard.name}"
        for position in positions[2:4]
        for window in windows_at(mixture, position)
    }
    assert set(between) == taken and len(between) == len(taken)


# ---- settings, and what a resume compares ----

TWO = ("--data.sources", "[{source: gs://b/web/, weight: 7}, {source: /data/code, weight: 3, name: py}]")


def test_a_mixture_is_named_on_the_command_line_and_read_back_from_its_yaml(tmp_path):
    config = parse([*TWO, "--max-steps", "5"]).config  # the config file's own data.source gives way
    assert config.data.source == "" and isinstance(config.data.sources[0], SourceConfig)
    assert [(each.title, each.weight) for each in config.data.sources] == [("web", 7), ("py", 3)]
    assert [(name, one.source) for name, one in alone(config.data)] == [("py", "/data/code"), ("web", "gs://b/web/")]
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert dataclasses.replace(parse(["--config", str(path)]).config, run=config.run) == config
    one = parse(["--config", str(path), "--data", "elsewhere"]).config.data
    assert one.source == "elsewhere" and one.sources == ()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([*TWO], "train.epochs means nothing for data.sources"),
        ([*TWO, "--data", "x", "--max-steps", "1"], "data.source x and data.sources exclude each other"),
        (["--data.sources", "[{source: a, weight: 1}]", "--max-steps", "1"], "one source, which is no mixture"),
        (
            ["--data.sources", "[{source: a/x, weight: 1}, {source: b/x, weight: 1}]", "--max-steps", "1"],
            "2 are called 'x': give each a name",
        ),
        (
            ["--data.sources", "[{source: a, weight: 0}, {source: b, weight: -.5}]", "--max-steps", "1"],
            "a has weight 0.0, expected above 0",
        ),
        (
            ["--data.sources", "[{source: 'a b', weight: 1}, {source: b, weight: 1}]", "--max-steps", "1"],
            "a b can't be called 'a b': give it a name",
        ),
        (["--data.sources", "[{source: a, wait: 1}]"], "gs://b/web, weight: 0.7}, …]: Option 'wait' is not accepted"),
        (["--data.sources", "web"], "data.sources is 'web'"),
    ],
)
def test_an_impossible_mixture_is_a_config_error(argv, why):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert why in str(error.value) and "\n" not in error.value.problems[0]


def found(folder: Path, names: list[str]) -> dict[str, ShardSet]:
    return {name: ShardSet(tuple(shards_of(folder, name))) for name in names}


def data_of(weights: dict[str, float]) -> DataConfig:
    return DataConfig(sources=tuple(SourceConfig(f"gs://b/{name}", weight) for name, weight in weights.items()))


def test_a_resume_with_another_mixture_is_refused_and_the_difference_named(tmp_path):
    weights = {"web": 0.7, "code": 0.3}
    order = DataOrder.of(data_of(weights), found(tmp_path, ["code", "web"]), 1, SEQ_LEN)
    saved = json.loads(json.dumps(dataclasses.asdict(order)))
    order.check(saved, "checkpoint")
    DataOrder.of(data_of({"code": 3, "web": 7}), found(tmp_path, ["code", "web"]), 1, SEQ_LEN).check(saved, "the same")

    def refused(weights: dict[str, float], sets: dict[str, ShardSet]) -> str:
        with pytest.raises(CheckpointError) as error:
            DataOrder.of(data_of(weights), sets, 1, SEQ_LEN).check(saved, "checkpoint")
        return str(error.value)

    assert "source code had a share of 3/10 and has 1/2" in refused(
        {"code": 1, "web": 1}, found(tmp_path, ["code", "web"])
    )
    told = refused({"books": 0.3, "web": 0.7}, found(tmp_path, ["books", "web"]))
    assert "source books is new; source code is gone" in told and "web" not in told.partition("order:")[2]
    changed = {**found(tmp_path, ["code"]), "web": ShardSet(tuple(shards_of(tmp_path, "books")))}
    assert "source web has other shards" in refused(weights, changed)


def test_a_checkpoint_of_one_source_resumes_and_does_not_become_a_mixture(tmp_path):
    sets = {"": ShardSet(tuple(shards_of(tmp_path, "web")))}
    order = DataOrder.of(DataConfig(source="web"), sets, 1, SEQ_LEN)
    before = {name: getattr(order, name) for name in ("fingerprint", "seed", "seq_len", "shuffle_shards")}
    order.check(before, "of a version without mixtures")
    mixed = DataOrder.of(data_of({"code": 1, "web": 1}), found(tmp_path, ["code", "web"]), 1, SEQ_LEN)
    with pytest.raises(CheckpointError, match=r"it had data.source, and this has data.sources"):
        mixed.check(before, "old")
    with pytest.raises(CheckpointError, match=r"it had data.sources, and this has data.source\."):
        order.check(dataclasses.asdict(mixed), "new")
    how = {"seq_len": SEQ_LEN, "global_size": 2, "seed": 1}
    assert type(lay_out(DataConfig(source="web"), sets, **how)) is Batches
    assert type(lay_out(data_of({"code": 1, "web": 1}), found(tmp_path, ["code", "web"]), **how)) is Mixture


def test_sources_of_different_tokenizers_are_refused_and_both_named():
    def manifest(tokenizer: str = "bpe", vocab_size: int = 300, eot_id: int | None = 0) -> DataManifest:
        return DataManifest(tokenizer, vocab_size, eot_id, ())

    none = {"a": None, "b": None}
    check_same_tokenizer({"a": manifest(), "b": None, "c": manifest("", 0, None)}, {"a": "{}", "b": None, "c": "{}"})
    for differing, said in (
        (manifest("tiktoken:gpt2"), "a: manifest.json says tokenizer bpe, b: tiktoken:gpt2"),
        (manifest(vocab_size=400), "a: manifest.json says vocab_size 300, b: 400"),
        (manifest(eot_id=1), "a: manifest.json says eot_id 0, b: 1"),
    ):
        with pytest.raises(ShardError, match=said):
            check_same_tokenizer({"a": manifest(), "b": differing}, none)
    with pytest.raises(ShardError, match=r"a and b have different tokenizer.json files"):
        check_same_tokenizer(none, {"a": "{}", "b": "{ }"})
