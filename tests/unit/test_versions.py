from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from pretrain.versions import check_versions

INSTALLED = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "jsonargparse": "4.53.0", "google-cloud-storage": "3.17.1"}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    def version(name: str) -> str:
        if name not in INSTALLED:
            raise metadata.PackageNotFoundError(name)
        return INSTALLED[name]

    monkeypatch.setattr(metadata, "version", version)


def problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "requirements.txt"
    path.write_text(text)
    return check_versions(path)


def test_the_tested_versions_have_no_problem(tmp_path):
    text = """
    # what was tested
    --index-url https://example.org/simple
    torch==2.13.0            # a local version counts as its public one
    numpy==2.4.6; python_version >= "3.10"
    numpy==1.0; python_version < "3.0"
    jsonargparse[signatures]==4.53.0
    google-cloud-storage==3.17.1 \\
        --hash=sha256:aaaa \\
        --hash=sha256:bbbb
    """
    assert problems(tmp_path, text) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch==2.12.0", "torch is 2.13.0+cpu, requirements.txt pins 2.12.0"),
        ("torch==2.12.0+cpu", "torch is 2.13.0+cpu, requirements.txt pins 2.12.0+cpu"),
        ("absent==1.0", "absent is not installed, requirements.txt pins 1.0"),
        ("absent", "absent is not installed, requirements.txt asks for it"),
        ("numpy>=3", "numpy is 2.4.6, requirements.txt asks for >=3"),
        ("jsonargparse[signatures]==4.52.9", "jsonargparse is 4.53.0, requirements.txt pins 4.52.9"),
        ("numpy==2.4.6 or so", "requirements.txt has a line that is not a requirement: 'numpy==2.4.6 or so'"),
    ],
)
def test_each_difference_is_one_sentence(tmp_path, line, expected):
    assert problems(tmp_path, line) == [expected]


@pytest.mark.parametrize("line", ["torch==2.13.0+cu130", "torch==2.13.*", "torch>=2.10,<3", "numpy"])
def test_local_builds_wildcards_and_ranges_fit(tmp_path, line):
    assert problems(tmp_path, line) == []


def test_all_differences_are_reported_at_once(tmp_path):
    assert len(problems(tmp_path, "torch==1.0\nnumpy==1.0\nabsent==1.0\n")) == 3


def test_a_missing_requirements_file_is_a_problem_not_a_crash(tmp_path):
    assert "No such file" in check_versions(tmp_path / "requirements.txt")[0]
