"""Are the installed packages the ones that were tested? Compares them with the pins of requirements.txt."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import Specifier
from packaging.version import InvalidVersion, Version


def check_versions(requirements: Path) -> list[str]:
    """Every difference between the installed distributions and a requirements file.

    Local versions count as their public one: 2.13.0+cpu and 2.13.0+cu130 are both 2.13.0. Lines whose environment
    marker is false here are passed over, and so are pip's own options.

    Args:
        requirements: a file in pip's format; what it includes with `-r` is not followed.

    Returns:
        One sentence a problem, "torch is 2.12.0, requirements.txt pins 2.13.0"; empty: all is as tested.
    """
    try:
        text = requirements.read_text(encoding="utf-8")
    except OSError as error:
        return [f"{requirements} can't be read: {error.strerror or error}"]
    lines = _requirement_lines(text)
    return [problem for line in lines if (problem := _problem(line, requirements.name))]


def _requirement_lines(text: str) -> list[str]:
    """The requirements of a file: comments, options and hashes taken off, continued lines joined."""
    joined = re.sub(r"\\\r?\n", " ", text)
    bare = (re.sub(r"(^|\s)#.*|\s--hash[= ]\S+", "", line).strip() for line in joined.splitlines())
    return [line for line in bare if line and not line.startswith("-")]


def _problem(line: str, file_name: str) -> str:
    """What is wrong with one requirement, or ''."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return f"{file_name} has a line that is not a requirement: {line!r}"
    if requirement.marker and not requirement.marker.evaluate():
        return ""
    wanted = _wanted(requirement)
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, {file_name} {wanted}"
    if all(_satisfies(installed, specifier) for specifier in requirement.specifier):
        return ""
    return f"{requirement.name} is {installed}, {file_name} {wanted}"


def _wanted(requirement: Requirement) -> str:
    """`pins 2.13.0` for an exact pin, `asks for >=2` for a range, `asks for it` for neither."""
    specifiers = list(requirement.specifier)
    if len(specifiers) == 1 and specifiers[0].operator == "==":
        return f"pins {specifiers[0].version}"
    return f"asks for {requirement.specifier}" if specifiers else "asks for it"


def _satisfies(installed: str, specifier: Specifier) -> bool:
    """Whether a version fits, both sides taken without their local part (`+cpu`)."""
    try:
        public = Version(installed).public
    except InvalidVersion:
        return installed == specifier.version
    wanted = Specifier(f"{specifier.operator}{specifier.version.split('+')[0]}")
    return wanted.contains(public, prereleases=True)
