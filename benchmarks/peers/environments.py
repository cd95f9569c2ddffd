"""The environments of the peers: one of its own for each set of packages, layered over this one.

litgpt and transformers 5 want different versions of huggingface-hub. What an environment does not have itself (torch)
it takes from the one that runs the benchmark, so nothing large is downloaded twice.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from pretrain.errors import ConfigError

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".venv" / "peers"


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
    own = folder / "lib" / version / "site-packages"
    (own / "layer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)]
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    if ended.returncode:
        raise ConfigError(
            f"the packages of {wanted.name} could not be installed into {folder}",
            "Look at pip's message above; without a network leave --peers out.",
        )
    done.write_text(_stamp(wanted), encoding="utf-8")
    return str(python)


def _stamp(wanted: Path) -> str:
    """What an environment was made of."""
    return f"{sys.prefix}\n{wanted.read_text(encoding='utf-8')}"
