"""requirements.lock is requirements.txt with everything that it leads to, and each package has its hashes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pretrain.versions import check_versions

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
MEND = "bash scripts/lock_requirements.sh"
BY_VERSION_ONLY = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py$).*")  # torch and what its CUDA builds bring
PYTHONS = ("3.10", "3.11", "3.12")


def entries(path: Path) -> list[tuple[Requirement, list[str]]]:
    """(requirement, its hashes) of a file in pip's format."""
    found = []
    for entry in re.sub(r"\\\n", " ", path.read_text(encoding="utf-8")).splitlines():
        if line := re.sub(r"(^|\s)#.*", "", entry).strip():
            bare, *hashes = re.split(r"\s+--hash=", line)
            found.append((Requirement(bare), hashes))
    return found


def pins_for(path: Path, python: str) -> dict[str, str]:
    """Package -> version on Linux with one Python."""
    machine = {"platform_machine": "x86_64", "sys_platform": "linux", "platform_system": "Linux"}
    here = {"python_version": python, "python_full_version": f"{python}.1", **machine}
    chosen = [each for each, _ in entries(path) if each.marker is None or each.marker.evaluate(here)]
    pins = {str(canonicalize_name(each.name)): str(each.specifier).removeprefix("==") for each in chosen}
    assert len(pins) == len(chosen), f"a package has two pins for Python {python}"
    return pins


def needed(names: dict[str, set[str]]) -> Iterator[str]:
    """Every package that some packages with extras lead to, as they are installed here."""
    seen: set[tuple[str, str]] = set()
    left = [(name, extra) for name, extras in names.items() for extra in {"", *extras}]
    while left:
        name, extra = left.pop()
        if (name, extra) in seen or BY_VERSION_ONLY.fullmatch(name):
            continue
        seen.add((name, extra))
        yield name
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(wanted.name), each) for each in {"", *wanted.extras}]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_of_requirements_txt_is_locked(python: str) -> None:
    pins, locked = pins_for(ROOT / "requirements.txt", python), pins_for(LOCK, python)
    expected = {name: version for name, version in pins.items() if not BY_VERSION_ONLY.fullmatch(name)}
    assert {name: locked.get(name) for name in expected} == expected, MEND


def test_every_entry_is_one_version_with_hashes() -> None:
    for requirement, hashes in entries(LOCK):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_torch_and_its_cuda_packages_are_left_to_the_machine() -> None:
    assert not [each.name for each, _ in entries(LOCK) if BY_VERSION_ONLY.fullmatch(each.name)]


def test_nothing_that_is_led_to_is_missing() -> None:
    """setup_env.sh installs with --no-deps, so what the lock lacks would be lacking."""
    wanted = {canonicalize_name(each.name): each.extras for each, _ in entries(ROOT / "requirements.txt")}
    locked = {canonicalize_name(each.name) for each, _ in entries(LOCK)}
    assert set(needed(wanted)) - locked == set(), MEND


def test_what_is_installed_is_what_is_locked() -> None:
    assert check_versions(LOCK) == [], "bash setup_env.sh"
