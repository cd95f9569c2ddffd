"""Scenario 18: files made to run code, to escape their folder or to fill the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import hostile
from tests.chaos.score import Score
from tests.runs import plain_environment

MEMORY_MB = 64  # far below the smallest bomb, which is 500 MB inflated
REFUSALS = {
    "npz": {"ShardError"},
    "tar": {"CheckpointError"},
    "manifest": {"CheckpointError", "ValueError"},
    "pt": {"SafetensorError", "CheckpointError", "ValueError"},
    "header": {"SafetensorError", "CheckpointError"},
}


@pytest.mark.chaos(18)
def test_no_malicious_file_runs_code_escapes_its_folder_or_fills_the_memory(tmp_path: Path, score: Score):
    command = [sys.executable, hostile.__file__, str(tmp_path / "files")]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    met = json.loads(done.stdout)
    assert set(met) == set(hostile.CASES)
    for name, found in met.items():
        with score.run():
            assert found["error"] in REFUSALS[name.split("_")[0]], (name, found)
            score.at_most("memory_grown", round(found["grown_mb"], 1), MEMORY_MB, "MB", (name, found))
    score.equal("files_refused", score.passed, len(hostile.CASES), "files")
    owned = [path for path in tmp_path.rglob("*") if path.name in ("owned", "escaped", "escaped.npy")]
    score.equal("code_run_or_escaped", len(owned), 0, "files", owned)
