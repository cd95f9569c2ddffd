"""The environments of the peers: one of its own for each set of packages, and the torch of this one in all of them.

litgpt and transformers 5 want different versions of huggingface-hub. Torch, which is large, and what a CUDA build of it
brings are linked from the environment that runs the benchmark: every side has the same one.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

from pretrain.errors import ConfigError

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".venv" / "peers"
SHARED = re.compile(r"torch|triton|(nvidia|cuda)-.*")


def python_of(name: str) -> str:
    """The interpreter for a set of packages, `requirements-NAME.txt`; made where it isn't there, or is of others.

    Args:
        name: "" for the interpreter of the benchmark itself.

    Raises:
        ConfigError: the packages can't be installed.
    """
    if not name:
        return sys.executable
    wanted = HERE / f"requirements-{name}.txt"
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "done.txt"
    if done.exists() and done.read_text(encoding="utf-8") == _stamp(wanted):
        return str(python)
    print(f"installing {', '.join(wanted.read_text(encoding='utf-8').split())} into {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    _link_torch(folder / "lib" / version / "site-packages")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)]
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    if ended.returncode:
        raise ConfigError(
            f"the packages of {wanted.name} could not be installed into {folder}",
            "Look at pip's message above; without a network leave --peers out.",
        )
    done.write_text(_stamp(wanted), encoding="utf-8")
    return str(python)


def _link_torch(site: Path) -> None:
    """Put links to torch and its CUDA packages into an environment; pip then takes them for installed."""
    for package in importlib.metadata.distributions():
        if SHARED.fullmatch(package.name):
            parts = {Path(file).parts[0] for file in package.files or ()} - {"..", "__pycache__"}
            for part in parts:
                link = site / part
                if not link.exists():
                    link.symlink_to(Path(str(package.locate_file(part))).resolve())


def _stamp(wanted: Path) -> str:
    """What an environment was made of."""
    return f"{sys.prefix}\n{wanted.read_text(encoding='utf-8')}"
