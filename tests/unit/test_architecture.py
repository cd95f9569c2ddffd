"""The arrows of the design: which part may know which, who sees the whole config, and how long things may get."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted((ROOT / "pretrain").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
SOURCES = [*LIBRARY, *SCRIPTS, ROOT / "model.py", ROOT / "train.py"]

# From raw text to shards: of the area "data".
PREPARATION = {
    "raw_files",
    "decompression",
    "tables",
    "documents",
    "encoders",
    "tokenizer_choice",
    "parts",
    "encoding_pool",
    "shard_files",
    "shard_writer",
    "recipes",
    "work_folder",
    "preparation",
    "raw_source",
    "raw_shards",
}
# area: (its modules, the areas it may import besides itself). A new module is given its place here.
AREAS: dict[str, tuple[set[str], set[str]]] = {
    "base": (
        {
            "config",
            "config_checks",
            "errors",
            "failpoints",
            "garbage",
            "gpus",
            "log",
            "model_config",
            "optim_config",
            "startup",
        },
        set(),
    ),
    "model": ({"compiler", "decompositions", "document_mask", "fp8", "kernels", "kv_cache"}, {"base", "ranks"}),
    "storage": (
        {"storage", "gcs", "gcs_transfers", "fsspec_store", "retry", "credentials", "embedded", "files"},
        {"base"},
    ),
    "data": (
        {
            "manifest",
            "npz",
            "room",
            "cache",
            "shard_feed",
            "shards",
            "read_ahead",
            "epochs",
            "batches",
            "mixture",
            "data_stats",
            "lookup",
            "tokenizers",
        }
        | PREPARATION,
        {"base", "storage"},
    ),
    "ranks": ({"communication", "ranks"}, {"base"}),
    "engine": ({"engine", "optim"}, {"base", "ranks"}),
    "checkpoint": (
        {
            "archive",
            "backlog",
            "catalog",
            "checkpoint",
            "checkpoint_manifest",
            "comparison",
            "discovery",
            "resumption",
            "keeper",
            "leftovers",
            "node_disks",
            "local_writer",
            "run_folder",
            "run_lock",
            "shipping",
            "snapshot",
            "upload_queue",
            "uploads",
        },
        {"base", "storage", "ranks", "engine"},
    ),
    "inference": (
        {
            "pretrained",
            "hf_config",
            "hf_source",
            "hf_weights",
            "export",
            "generation",
            "text_stream",
            "writer",
            "eval_sources",
            "evaluation",
            "harness",
        },
        {"base", "model", "storage", "data", "ranks", "engine", "checkpoint"},
    ),
    "metrics": (
        {
            "metrics",
            "sinks",
            "console",
            "history",
            "hardware",
            "transfers",
            "curves",
            "charts",
            "checks",
            "listings",
            "ledger",
            "phases",
            "power",
            "profiling",
            "sensors",
            "telemetry",
        }
        | {"log_sources", "log_uploads", "monitor", "monitor_views", "power_log", "run_logs", "settings"},
        {"base", "storage"},
    ),
    "plan": ({"activations", "host_memory", "memory", "plan", "scaling"}, {"base", "engine"}),
    "run": (
        {
            "alike",
            "arguments",
            "budget",
            "corpus",
            "data_views",
            "divergence",
            "hostfile",
            "launch",
            "memory_count",
            "micro_batch",
            "outset",
            "places",
            "plan_views",
            "processes",
            "progress",
            "proof",
            "raw_worker",
            "rendezvous",
            "report_page",
            "report_series",
            "report_tables",
            "reports",
            "rollback",
            "run",
            "stopping",
            "supervise",
            "topology",
            "trial",
            "versions",
            "watchdog",
        },
        {"base", "model", "storage", "data", "ranks", "engine", "checkpoint", "inference", "metrics", "plan"},
    ),
    "doctor": (
        {"bandwidth", "data_checks", "doctor", "gpu_checks", "machine_checks", "storage_checks", "torch_checks"},
        {"base", "model", "storage", "data", "ranks", "engine", "checkpoint", "metrics", "plan", "run"},
    ),
}
# Narrower than their area: the modules (of pretrain) that a module may import besides config, errors and log.
ONLY: dict[str, set[str]] = {
    "config": {"model_config", "optim_config"},
    "model_config": set(),
    "optim_config": {"model_config"},
    "failpoints": set(),
    "fp8": set(),
    "errors": set(),
    "garbage": set(),
    "gpus": set(),
    "log": set(),
    "startup": set(),
    "files": set(),
    "batches": {"epochs", "read_ahead", "shard_feed", "shards"},
    "epochs": set(),
    "read_ahead": set(),
    "room": {"files"},
    "optim": set(),
    "uploads": {"archive", "checkpoint_manifest", "files", "storage"},
    "archive": {"checkpoint_manifest", "files"},
    "backlog": {"uploads"},
    "launch": {"communication", "processes", "rendezvous", "reports", "stopping"},
    "communication": set(),
    "ledger": set(),
    "phases": set(),
    "sensors": set(),
    "profiling": set(),
    "processes": set(),
    "rendezvous": {"processes"},
    "stopping": set(),
    "supervise": {"arguments", "checkpoint_manifest", "ledger", "processes", "stopping"},
    "watchdog": set(),
    "activations": {"model_config"},
    "memory": {"activations", "model_config"},
    "plan": {"memory", "engine", "model_config"},
    "scaling": {"activations", "memory", "model_config"},
}
BUILDERS = {"GPT", "KERNELS", "draw", "plain_attention"}  # what of model.py the library may import: what builds one
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_LOOP_LINES = 350, 40, 100
LOOP = ("train.py", "loop")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST, *, in_functions: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of every import below a node that happens when the program runs."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) or (isinstance(child, ast.FunctionDef) and not in_functions):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: imports here are absolute"
            yield from ((child.module or "", alias.name) for alias in child.names)
        else:
            yield from imports(child, in_functions=in_functions)


def imports_of(path: Path, *, in_functions: bool = True) -> list[tuple[str, str]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), in_functions=in_functions))


def noun(path: Path) -> str:
    """The module of a file below pretrain/; the engine's files are one noun."""
    return path.relative_to(ROOT / "pretrain").with_suffix("").parts[0]


def siblings(path: Path) -> set[str]:
    """The modules of pretrain that a file imports."""
    found = set()
    for module, name in imports_of(path):
        if module == "pretrain":
            found.add(name)
        elif module.startswith("pretrain."):
            found.add(module.split(".")[1])
    return found - {noun(path) if path in LIBRARY else ""}


def area_of(module: str) -> str:
    return next((area for area, (modules, _) in AREAS.items() if module in modules), "none")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


in_library = pytest.mark.parametrize("path", [path for path in LIBRARY if path.stem != "__init__"], ids=name_of)


@in_library
def test_every_module_has_its_area(path):
    assert area_of(noun(path)) != "none", f"give {noun(path)} its place in AREAS"


@in_library
def test_imports_point_one_way_between_areas(path):
    area = area_of(noun(path))
    allowed = {area} | AREAS[area][1]
    wrong = {module for module in siblings(path) if area_of(module) not in allowed}
    assert not wrong, f"{area} may import {sorted(allowed)}, not {sorted(wrong)}"


@pytest.mark.parametrize("module", ONLY)
def test_modules_that_may_know_little_know_little(module):
    wrong = siblings(ROOT / "pretrain" / f"{module}.py") - ONLY[module] - AREAS["base"][0]
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_the_areas_form_no_circle():
    list(TopologicalSorter({area: below for area, (_, below) in AREAS.items()}).static_order())


def test_the_modules_form_no_circle():
    """Imports inside functions are left out: storage opens gcs there, which stands on storage."""
    graph: dict[str, set[str]] = {}
    for path in LIBRARY:
        for module, name in imports_of(path, in_functions=False):
            if module.split(".")[0] == "pretrain":
                imported = f"pretrain.{name}" if module == "pretrain" else module
                graph.setdefault(".".join(path.relative_to(ROOT).with_suffix("").parts), set()).add(imported)
    list(TopologicalSorter(graph).static_order())


@in_library
def test_the_library_knows_neither_train_nor_scripts(path):
    imported = imports_of(path)
    assert not {module.split(".")[0] for module, _ in imported} & {"train", "scripts", "tests", "benchmarks"}
    assert {name for module, name in imported if module == "model"} <= BUILDERS


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_stand_on_the_library_alone(path):
    """A script started as `python scripts/NAME.py` can't rely on another script, nor should it on train.py."""
    assert not {module.split(".")[0] for module, _ in imports_of(path)} & {"train", "scripts", "tests"}


def test_the_model_knows_torch_and_the_standard_library():
    known = {"torch", "flash_attn", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module, _ in imports_of(ROOT / "model.py")} <= known


@in_library
def test_no_part_is_handed_the_whole_config(path):
    # what reads it, what settles a run with train.py, and what holds all that train.py built
    if noun(path) not in ("config", "config_checks", "arguments", "outset", "run"):
        assert ("pretrain.config", "Config") not in imports_of(path)


def test_settings_are_read_without_torch():
    modules = "pretrain.config, pretrain.arguments, pretrain.plan, pretrain.supervise"
    modules += ", pretrain.monitor_views, pretrain.log_sources, pretrain.report_page"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["generate", "export_hf"])
def test_idle_threads_are_told_to_sleep_before_a_script_loads_torch(name):
    # OpenMP reads it as it is loaded. Spinning threads beside a busy process: 6 tokens/s in place of 115.
    code = (
        "import builtins, os; real = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    assert name != 'torch' or os.environ.get('OMP_WAIT_POLICY') == 'PASSIVE'\n"
        "    return real(name, *rest)\n"
        f"builtins.__import__ = watched\nimport scripts.{name}, sys; sys.exit('torch' not in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES, "split it along a noun"
    long = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = MAX_LOOP_LINES if (path.name, node.name) == LOOP else MAX_FUNCTION_LINES
            if (lines := code_lines(node)) > limit:
                long[node.name] = lines
    assert not long


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function from its `def` to its end, the docstring not counted."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) and first.end_lineno:
        total -= first.end_lineno - first.lineno + 1
    return total
