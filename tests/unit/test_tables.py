"""README quotes what the results files say, and nothing else."""

from __future__ import annotations

import json

from benchmarks import tables


def test_readme_says_what_the_results_say():
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"


def test_the_section_has_the_ratios_and_what_was_missed(tmp_path):
    ratio = {"documented": {"ours_is_faster": 1.304}, "best": {"ours_is_faster": 1.05}}
    rows = {
        "small bf16": {"tokens_per_second": 5123.4, "of_matrix_rate": 0.523, "peers": {"plain": ratio}},
        "small fp32": {"tokens_per_second": 1.0, "of_matrix_rate": 0.5},
    }
    checks = [
        {"name": "small_bf16_over_plain_documented", "value": 1.304, "goal": 1.25, "unit": "x", "passed": True},
        {"name": "small_bf16_over_plain_best", "value": 1.05, "goal": 1.1, "unit": "x", "passed": False},
    ]
    (tmp_path / "cpu-2core").mkdir()
    (tmp_path / "cpu-2core" / "train.json").write_text(json.dumps({"rows": rows, "checks": checks}))
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert tables.rewritten(text, tables.speed_section(tmp_path)).splitlines() == [
        "before",
        tables.BEGIN,
        "| cpu-2core | tokens/s | of matrix rate | plain PyTorch |",
        "|---|---|---|---|",
        "| small bf16 | 5,123 | 52% | 1.30 / 1.05 \\* |",
        "| small fp32 | 1 | 50% | – |",
        "",
        "\\* misses its goal (1.1 x), as 1 of 2 do.",
        tables.END,
        "after",
    ]
