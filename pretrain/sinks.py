"""Where records are shown besides metrics.jsonl: TensorBoard and Weights & Biases (the terminal is in console.py)."""

from __future__ import annotations

import json
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pretrain import log
from pretrain.errors import ConfigError

RUN_ID_FILE = "wandb_run_id"
PATIENCE_S = 20  # a run waits no longer than this for W&B at its start, nor at its end: spot machines give 30 s
FLUSH_S = 1.0

_log = log.get(__name__)


class Sink:
    """Shows records and keeps none; a subclass overrides what it has something to show for."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one step's record, without fields that are None."""

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Show what happened between steps."""

    def summary(self, fields: Mapping[str, Any]) -> None:
        """Show the end of the run."""

    def close(self) -> None:
        """Write out what is buffered and let go of everything."""


def tag(field: str) -> str:
    """The chart of a field, in groups: train/loss, perf/mfu, system/gpu_power_w, val/loss."""
    if field.startswith(("share/", "tokens/")):  # of a mixture's sources
        return f"data/{field}"
    if field.startswith("val_"):
        return f"val/{field.removeprefix('val_')}"
    if field.startswith(("gpu_", "cpu_", "host_", "power_", "energy_")):
        return f"system/{field}"
    if field.startswith("mfu") or field.endswith(("_ms", "_per_second")):
        return f"perf/{field}"
    return f"train/{field}"


def _charts(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under their tags; step and time are the axes."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    return {tag(key): value for key, value in numbers.items() if key not in ("step", "time")}


class TensorBoardSink(Sink):
    """TensorBoard event files in `folder`; what earlier files have of the steps beyond `first_step` is hidden, also
    where a run that was killed before its first checkpoint begins anew."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"log.tensorboard is on: {error}", "bash setup_env.sh, or --no-tensorboard") from error
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        self._writer: Any = self._open(first_step)
        self._writer.add_text("settings", _indented(settings), first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _charts(record).items():
            self._writer.add_scalar(name, value, record["step"], record["time"])

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "sample":
            self._writer.add_text("sample", _verbatim(f"{fields['prompt']}{fields['text']}"), fields["step"])
            return
        if kind == "rolled_back":  # the steps beyond are taken again
            self._writer.close()
            self._writer = self._open(fields["step"])
        if isinstance(fields.get("step"), int):
            self._writer.add_text(f"events/{kind}", _indented(fields), fields["step"])

    def summary(self, fields: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", _indented(fields), fields.get("steps"))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _indented(fields: Mapping[str, Any]) -> str:
    return _verbatim(json.dumps(fields, indent=2, default=str))


def _verbatim(text: str) -> str:
    """A Markdown code block, which TensorBoard shows as it stands."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class WandbSink(Sink):
    """Weights & Biases, offline where no API key is set; whatever goes wrong there is a warning and no more.

    The run id is kept in `folder`/wandb_run_id and in every checkpoint, so that a resumed run goes on as the same W&B
    run. W&B can't take back what it was sent, so steps that are taken again are not sent again: each stands there once,
    as it was first. Of a process that was killed the steps of its last second may be missing.

    Args:
        shown_until: the last step that an earlier process of the same W&B run has shown.
        carried_id: of the checkpoint that was resumed; '' where it has none.

    Attributes:
        run_id: of the W&B run.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        run_name: str,
        settings: Mapping[str, Any],
        first_step: int,
        shown_until: int = 0,
        carried_id: str = "",
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"log.wandb is on: {error}", "bash setup_env.sh, or --no-wandb") from error
        self._wandb: Any = wandb
        self._folder = folder
        self._settings = {"project": project, "name": run_name, "config": dict(settings)}
        self.run_id = _wandb_run_id(folder, first_step, carried_id)
        self._shown_until = shown_until if first_step else 0
        self._sampled_until = self._shown_until
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        try:
            self._start(mode)
        except Exception as error:  # noqa: BLE001 - W&B raises a dozen kinds that share no base
            _log.warning("W&B can't be reached, going on offline: %s", " ".join(str(error).split()))
            self._guard(self._start_again_offline)
        if self._run is not None and self._run.offline:
            _log.info("W&B is offline; to send the run later: wandb sync %s/wandb/offline-run-*", folder)

    def _start(self, mode: str) -> None:
        # console="off": training.log has the output, and W&B's own capture breaks the progress bar.
        quiet = self._wandb.Settings(
            console="off",
            silent=True,
            init_timeout=PATIENCE_S,
            finish_timeout=PATIENCE_S,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_S,  # a kill loses what the offline file does not have yet
        )
        resume = "allow" if mode == "online" else None  # offline the id alone does it
        self._run = self._wandb.init(
            mode=mode, id=self.run_id, resume=resume, dir=str(self._folder), settings=quiet, **self._settings
        )
        # The step is a field and not W&B's own counter, which refuses to go back to a checkpoint's step.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _start_again_offline(self) -> None:
        self._wandb.teardown()  # its service still holds the run id of the try that failed
        self._start("offline")

    def _guard(self, call: Callable[..., object], *args: Any) -> None:
        """Call W&B; its first failure is a warning and ends the sink."""
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - and none of them may end a training
            self._run = None
            _log.warning("W&B failed and is off until the next start: %s", " ".join(str(error).split()))

    def write(self, record: Mapping[str, Any]) -> None:
        if self._run is not None and record["step"] > self._shown_until:
            self._shown_until = record["step"]
            self._guard(self._run.log, {"step": record["step"], **_charts(record)})

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "sample" and self._run is not None and fields["step"] > self._sampled_until:
            self._sampled_until = fields["step"]
            self._guard(self._show_sample, fields)

    def _show_sample(self, fields: Mapping[str, Any]) -> None:
        columns = ["step", "prompt", "text"]
        table = self._wandb.Table(columns=columns, data=[[fields[name] for name in columns]])
        self._run.log({"step": fields["step"], "sample": table})

    def summary(self, fields: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._guard(self._run.summary.update, dict(fields))

    def close(self) -> None:
        if self._run is not None:
            self._guard(self._run.finish)
            self._run = None


def has_wandb_key() -> bool:
    """Whether an API key is set: in WANDB_API_KEY, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except FileNotFoundError:
        return False
    except (OSError, netrc.NetrcParseError) as error:
        _log.warning("no W&B key from %s: %s", path, error)
        return False


def _wandb_run_id(folder: Path, first_step: int, carried_id: str) -> str:
    """The id of the run being resumed, or a new one, kept for the next resume."""
    path = folder / RUN_ID_FILE
    kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    known = carried_id or kept if first_step else ""
    if known and known == kept:
        return known
    run_id = known or secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id
