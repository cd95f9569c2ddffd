"""What README and docs say of files, options and counts is held against the files, the options and the counts."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.arguments import ALIASES, SWITCHES
from pretrain.config import Config
from pretrain.model_config import FAMILIES, MODEL_SIZES, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# options of the scripts and launchers that pages show beside train.py's
TRAIN_COMMAND = re.compile(r"\btrain\.py[^\n`]*")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|benchmarks|configs|tests|docs|launch|pretrain)/[\w./-]+\.\w+", text))
    named |= set(re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    missing = [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]
    assert not [name for name in missing if "NAME" not in name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_settings_that_a_page_names_exist(page):
    sections = {section.name: vars(section.default_factory()) for section in dataclasses.fields(Config)}
    text = page.read_text(encoding="utf-8")
    for section, name in re.findall(r"--(\w+)\.(\w+)", text):
        assert section == "section" or name in sections[section], f"--{section}.{name}"
    others = ("--config", "--print_config", "--debug", "--force", "--help")
    known = {option.replace("_", "-") for option in (*ALIASES, *SWITCHES, *others)}
    for command in TRAIN_COMMAND.findall(text):
        for option in re.findall(r"(?<= )--[\w-]+(?![\w.-])", command):
            assert option.replace("_", "-") in known, f"{option} in {command}"


def test_the_models_page_has_every_size_with_its_count_and_every_familys_options():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for size in MODEL_SIZES:
        model = ModelConfig(size=size).resolve()
        row = next(line for line in text.splitlines() if re.match(rf"\| (.*, )?{size}[ ,]", line))
        heads = f"{model.n_head} ({model.n_kv_head})" if model.n_kv_head != model.n_head else str(model.n_head)
        wide = f"{model.d_ff:,}" if model.d_ff > 9999 else str(model.d_ff)
        cells = [str(model.n_layer), heads, str(model.d_model), wide]
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [*cells, f"{model.n_parameters:,}"]
    columns = next(line for line in text.splitlines() if line.startswith("| option")).strip("|").split("|")[1:]
    assert [column.strip() for column in columns] == list(FAMILIES)
    for option in ("position", "activation"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{option}`")).strip("|").split("|")[1:]
        assert [cell.strip() for cell in row] == [getattr(ModelConfig(family=f).resolve(), option) for f in FAMILIES]
    neox = ModelConfig(family="neox", size="1.2B").resolve()
    assert f"{neox.n_parameters:,}" in text


def test_the_scaling_page_shows_what_its_command_prints():
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    command = re.search(r"^python (scripts/plan\.py .*--scaling.*)$", text, re.MULTILINE)[1]
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    words = [sys.executable, *command.split()]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout == shown
