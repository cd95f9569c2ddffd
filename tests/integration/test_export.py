"""Checkpoints out to Hugging Face and back in, through the command line and the real AutoModel."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model import GPT
from pretrain import export as export_module
from pretrain.arguments import to_yaml
from pretrain.checkpoint import CheckpointReader, read_manifest, write_documents, write_manifest
from pretrain.checkpoint import write_parts as write_tensors
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.config import Config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.hf_weights import entries
from pretrain.model_config import ModelConfig
from pretrain.pretrained import load_model_config, load_pretrained, open_checkpoint
from pretrain.snapshot import take_snapshot
from pretrain.tokenizers import END_OF_TEXT, train_bpe
from scripts import export_hf
from tests.helpers_training import flip_a_byte, upload_checkpoint
from tests.runs import ROOT, RUN, make_shards, plain_environment, store_of, train

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
RUN_FOLDER = Path("checkpoints") / "small"
SMALL = {"size": "custom", "n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 270, "seq_len": 24, "dropout": 0.0}
FAMILIES = ("gpt", "neox", "llama", "qwen3", "opt")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["hello world, hello there, a world of words " * 20], 270)


def commit(
    family="llama", step=5, sequence=1, *, tokenizer=None, ranks=1, model_section=None, folder=RUN_FOLDER, **more
):
    """A committed checkpoint of a random model below `folder`; its path."""
    config = ModelConfig(**{**SMALL, "family": family, **more}).resolve()
    torch.manual_seed(step)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.tok_emb.weight[config.vocab_size :] = 0
        model.head_weight[config.vocab_size :] = 0
    states = [
        (name, {"weight": weight, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)})
        for name, weight in model.named_parameters()
    ]
    name = CheckpointName(0, step, step)
    path = folder / str(name)
    path.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        files |= write_tensors(take_snapshot(states, rank, ranks), path, rank, ranks)
    text = to_yaml(dataclasses.replace(Config(), model=config))
    if model_section is not None:
        text = yaml.safe_dump({"model": model_section})
    documents = {"config.yaml": text, "metadata.json": "{}"}
    if tokenizer is not None:
        documents["tokenizer.json"] = tokenizer.to_str()
    files |= write_documents(documents, path)
    write_manifest(Manifest(name, "attempt1", sequence, files), path)
    return path


def run(*words):
    return export_hf.main([str(word) for word in words])


def logits(where, tokens):
    return load_pretrained(str(where), device=CPU, dtype=torch.float32).model(tokens)


def some_tokens(count=24):
    return torch.randint(270, (2, count), generator=torch.Generator().manual_seed(7))


# ---- out ----


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_with_the_auto_classes_and_comes_back_bit_for_bit(family, tokenizer):
    checkpoint = commit(family, tokenizer=tokenizer)
    assert run(checkpoint, "out") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert model.dtype == torch.float32 and model.config.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)
    tokens = some_tokens()
    with torch.no_grad():
        assert (model.eval()(tokens).logits - logits(checkpoint, tokens)).abs().max() < 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    assert theirs.encode("hello world") == tokenizer.encode("hello world").ids
    assert theirs.decode(theirs.encode("hello  world ,")) == "hello  world ,"
    assert (theirs.eos_token, theirs.pad_token, theirs.model_max_length) == (END_OF_TEXT, END_OF_TEXT, 24)
    assert model.generate(tokens[:, :3], max_new_tokens=4, do_sample=False).shape == (2, 7)

    before = load_pretrained(str(checkpoint), device=CPU, dtype=torch.float32)
    back = load_pretrained("out", device=CPU, dtype=torch.float32)
    assert (before.name, before.step, back.name, back.step) == (checkpoint.name, 5, "out", 0)
    assert back.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    for (name, one), (other_name, other) in zip(
        before.model.named_parameters(), back.model.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(one, other), name


def test_the_end_of_text_of_another_vocabulary_is_exported_and_its_cuts_and_pads_are_not_obeyed(tokenizer):
    spelled = Tokenizer.from_str(tokenizer.to_str().replace(END_OF_TEXT, "</s>"))  # as Llama's is
    spelled.enable_truncation(4)
    spelled.enable_padding(length=60)
    assert run(commit("llama", tokenizer=spelled), "out") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    end = spelled.token_to_id("</s>")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (end, end)
    assert transformers.AutoTokenizer.from_pretrained("out").eos_token == "</s>"


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_export_in_half_precision_holds_rounded_weights(dtype, torch_dtype):
    checkpoint = commit("qwen3")
    assert run(checkpoint, "out", "--dtype", dtype) == 0
    tensors = load_file("out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch_dtype}
    reader = open_checkpoint(str(checkpoint))
    rounded = reader.weight("blocks.1.mlp.up.weight").to(torch_dtype)
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], rounded)
    assert transformers.AutoModelForCausalLM.from_pretrained("out").dtype == torch_dtype


def test_a_big_export_is_several_files_and_an_index():
    checkpoint = commit("llama", ranks=3)
    assert run(checkpoint, "out", "--max_shard_gb", "0.00006") == 0
    files = sorted(Path("out").glob("model-*.safetensors"))
    assert len(files) >= 3 and not Path("out/model.safetensors").exists()
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        assert file.stat().st_mode & 0o044 == Path("out").stat().st_mode & 0o044
        with safe_open(file, "pt") as part:
            found |= dict.fromkeys(part.keys(), file.name)
            sizes = [part.get_tensor(name).nbytes for name in list(part.keys())]
        # a single parameter may be larger than a file should be: this model's q, k and v are one, so are its tables
        assert sum(sizes) <= 60_000 or len(sizes) in (1, 3)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    tokens = some_tokens()
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained("out").eval()(tokens).logits
    assert (theirs - logits(checkpoint, tokens)).abs().max() < 1e-4
    assert torch.equal(logits("out", tokens), logits(checkpoint, tokens))


def test_json_is_one_object_with_its_check(capsys):
    assert run(commit(), "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["architecture"] == "LlamaForCausalLM"
    assert found["loaded_by"] == f"transformers {transformers.__version__}"
    (check,) = found["checks"]
    assert check["name"] == "logits_difference" and 0 <= check["value"] <= check["goal"]
    assert set(found["files"]) == {path.name for path in Path("out").iterdir()}


def test_without_transformers_our_own_importer_tries_it_out(monkeypatch, capsys):
    checkpoint = commit("opt")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    assert run(checkpoint, "out") == 0
    assert "our own importer, as transformers is not installed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("importer", ["transformers", "ours"])
def test_a_wrong_export_is_found_out_and_leaves_nothing(monkeypatch, capsys, importer):
    def swapped(config):
        """Gate and up are of one shape: nothing but the logits can tell."""
        found = {entry.ours: entry for entry in entries(config)}
        gate, up = found["blocks.0.mlp.gate.weight"], found["blocks.0.mlp.up.weight"]
        found[gate.ours], found[up.ours] = (
            dataclasses.replace(gate, theirs=up.theirs),
            dataclasses.replace(up, theirs=gate.theirs),
        )
        return list(found.values())

    checkpoint = commit("llama")
    monkeypatch.setattr(export_module, "entries", swapped)
    if importer == "ours":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(checkpoint, "out") == 5
    assert "computes other logits" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["checkpoints"]


def test_nothing_is_left_where_writing_fails(monkeypatch, capsys):
    checkpoint = commit("llama")

    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", fail)
    assert run(checkpoint, "out") == 4
    assert "disk is full" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["checkpoints"]


def test_ctrl_c_leaves_nothing_and_shows_no_traceback(monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    checkpoint = commit()
    monkeypatch.setattr(export_module, "_try_out", interrupted)
    assert run(checkpoint, "out") == 130 and "stopped by Ctrl+C" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["checkpoints"]


def test_a_folder_with_something_in_it_is_left_alone(capsys):
    checkpoint = commit()
    Path("out").mkdir()
    assert run(checkpoint, "out") == 0  # an empty one is taken
    assert run(checkpoint, "out") == 2
    assert "not empty" in capsys.readouterr().err
    Path("file").write_text("mine")
    assert run(checkpoint, "file") == 2 and Path("file").read_text() == "mine"


def test_a_weight_too_big_for_fp16_is_named(capsys):
    checkpoint = commit("llama", step=6)
    reader = open_checkpoint(str(checkpoint))
    weight = reader.weight("ln_f.weight")
    weight[3] = 1e5

    class Reader(CheckpointReader):
        def weight(self, name):
            return weight if name == "ln_f.weight" else super().weight(name)

    with pytest.raises(ConfigError, match=r"ln_f\.weight has 1e\+05"):
        export_module.export(Reader(reader.folder, reader.manifest), Path("out"), dtype="fp16")
    assert not Path("out").exists()


# ---- which checkpoint ----


def test_a_run_is_its_newest_checkpoint_that_verifies(caplog):
    first, second = commit(step=5, sequence=1), commit(step=9, sequence=2)
    assert open_checkpoint(str(RUN_FOLDER)).folder == second
    flip_a_byte(next(second.glob("model-*.safetensors")))
    assert open_checkpoint(str(RUN_FOLDER)).folder == first
    assert "differs from the manifest's crc32c" in caplog.text
    flip_a_byte(next(first.glob("model-*.safetensors")))
    with pytest.raises(CheckpointError, match="no checkpoint that verifies"):
        open_checkpoint(str(RUN_FOLDER))


def test_a_damaged_checkpoint_is_refused_but_not_for_its_moments(capsys):
    checkpoint = commit()
    flip_a_byte(next(checkpoint.glob("optimizer-*.safetensors")))
    assert run(checkpoint, "out") == 0
    flip_a_byte(next(checkpoint.glob("model-*.safetensors")))
    assert run(checkpoint, "again") == 5
    assert "differs from the manifest's crc32c" in capsys.readouterr().err
    (checkpoint / "manifest.json").unlink()
    assert run(checkpoint, "again") == 5
    assert "no committed checkpoint" in capsys.readouterr().err
    assert not Path("again").exists()


@pytest.mark.parametrize("where", ["nowhere", ".", "gs://bucket", "s3://bucket/run"])
def test_what_is_no_checkpoint_is_one_line(where, capsys):
    assert run(where, "out") in (2, 5)
    error = capsys.readouterr().err.strip()
    assert "error: " in error and "\n" not in error and "Traceback" not in error


def test_a_checkpoint_in_a_bucket_is_fetched_without_its_moments(bucket_url):
    first, second = commit(step=5, sequence=1), commit(step=9, sequence=2)
    for path in (first, second):
        upload_checkpoint(store_of(bucket_url), "small", RUN_FOLDER, read_manifest(path))
    tokens = some_tokens()
    expected = logits(first, tokens), logits(second, tokens)
    shutil.rmtree("checkpoints")

    reader = open_checkpoint(f"{bucket_url}/small/")
    assert reader.folder == Path("cache/checkpoints/small") / second.name
    assert not list(reader.folder.glob("optimizer-*")) and list(reader.folder.glob("model-*"))
    assert torch.equal(logits(reader.folder, tokens), expected[1])
    assert run(f"{bucket_url}/small/{first.name}", "out", "--cache_dir", "elsewhere") == 0
    assert torch.equal(logits("out", tokens), expected[0])
    assert (Path("elsewhere/small") / first.name / "manifest.json").exists()

    flip_a_byte(next(reader.folder.glob("model-*.safetensors")))  # a damaged copy is fetched again
    assert torch.equal(logits(f"{bucket_url}/small", tokens), expected[1])
    with pytest.raises(CheckpointError, match="is no checkpoint and holds none"):
        open_checkpoint(f"{bucket_url}/other")


def test_what_the_cache_holds_whole_is_not_fetched_again(bucket_url, caplog):
    checkpoint = commit()
    upload_checkpoint(store_of(bucket_url), "small", RUN_FOLDER, read_manifest(checkpoint))
    caplog.set_level("INFO")
    open_checkpoint(f"{bucket_url}/small")
    assert caplog.text.count("fetching") == 1
    open_checkpoint(f"{bucket_url}/small")
    assert caplog.text.count("fetching") == 1


def test_a_damaged_checkpoint_in_a_bucket_is_passed_over(bucket_url, caplog):
    first, second = commit(step=5, sequence=1), commit(step=9, sequence=2)
    store = store_of(bucket_url)
    for path in (first, second):
        upload_checkpoint(store, "small", RUN_FOLDER, read_manifest(path))
    store.delete(f"small/{second.name}/attempt1/model-00001-of-00001.safetensors")
    assert open_checkpoint(f"{bucket_url}/small").manifest.name.step == 5
    assert "model-00001-of-00001.safetensors is missing" in caplog.text
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(f"{bucket_url}/small/{second.name}")


# ---- its config ----


def test_the_config_of_an_older_version_is_read():
    section = {**SMALL, "compile": False, "activation_checkpointing": True, "attention": "auto"}
    config = load_model_config(commit("gpt", model_section=section))
    assert (config.family, config.position, config.n_kv_head, config.bias) == ("gpt", "learned", 4, True)
    assert config.activation_checkpointing == "full"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**SMALL, "experts": 8}, "knows no model.experts"),
        ({**SMALL, "n_layer": "two"}, "model.n_layer is 'two'"),
        ({**SMALL, "family": "mamba"}, "model.family 'mamba' is unknown"),
        ({**SMALL, "n_head": 5}, "not divisible"),
        ({**SMALL, "bias": "yes"}, "model.bias is 'yes'"),
        ([], "has no section model"),
    ],
)
def test_a_config_that_cannot_be_right_says_so(section, words):
    with pytest.raises(CheckpointError) as raised:
        load_model_config(commit(model_section=section))
    assert words in str(raised.value) and "config.yaml" in str(raised.value)


def test_weights_of_another_shape_are_named(capsys):
    section = {**SMALL, "family": "llama", "d_ff": 99, "vocab_size": 500}
    assert run(commit("llama", model_section=section), "out") == 5
    error = capsys.readouterr().err
    for part in ("gate", "up"):
        assert f"blocks.0-1.mlp.{part}.weight is (256, 32) in the checkpoint and (99, 32) in the model" in error
    assert "blocks.0-1.mlp.down.weight is (32, 256) in the checkpoint and (32, 99) in the model" in error
    for name in ("tok_emb", "head"):
        assert f"{name}.weight is (384, 32) in the checkpoint and (512, 32) in the model" in error


def test_a_model_without_a_class_says_which_option_is_in_the_way(capsys):
    assert run(commit("llama", rotary_pct=0.5), "out") == 2
    assert "model.rotary_pct is 0.5" in capsys.readouterr().err
    assert not Path("out").exists()


# ---- in ----


def test_a_run_of_the_trainer_is_exported_and_trained_further(tmp_path):
    """train.py → export_hf.py → train.py --model.init_from, each as its own process."""
    make_shards(tmp_path / "shards")
    trained = train(tmp_path, "--model.family", "llama", "--model.n_kv_head", "1", "--max-steps", "4")
    assert trained.code == 0, trained.output
    command = [sys.executable, str(ROOT / "scripts" / "export_hf.py"), f"checkpoints/{RUN}", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=plain_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done: out is a LlamaForCausalLM" in done.stderr
    assert type(transformers.AutoModelForCausalLM.from_pretrained("out")).__name__ == "LlamaForCausalLM"

    manifest = {"tokenizer": "x", "vocab_size": 257 - 7, "eot_id": 0, "shards": []}  # the model has a few rows more
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    further = train(tmp_path, "--run", "further", "--model.init_from", "out", "--max-steps", "1", "--lr", "1e-12")
    assert further.code == 0, further.output
    before = open_checkpoint(f"checkpoints/{RUN}")
    after = open_checkpoint("checkpoints/further")
    assert before.parameter_names == after.parameter_names
    for name in before.parameter_names:
        assert torch.allclose(before.weight(name), after.weight(name), atol=1e-9), name
    assert load_model_config(after.folder).n_kv_head == 1
