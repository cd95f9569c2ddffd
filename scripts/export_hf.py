"""Write a checkpoint as a folder that Hugging Face transformers loads.

    python scripts/export_hf.py checkpoints/test exported
    python scripts/export_hf.py checkpoints/test/checkpoint-epoch0-step100-files25 exported --dtype bf16
    python scripts/export_hf.py gs://bucket/Checkpoints/production exported --max_shard_gb 2

CHECKPOINT is a checkpoint's folder, a run's folder (its newest checkpoint that verifies), or the gs:// url of either.
Before it says done it loads what it wrote, by transformers where that is installed, and compares the logits with those
of our own model on random tokens; on a mismatch OUT is not left behind. Then:

    AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")

Exit codes: 0 done, 2 wrong settings or a model that transformers has no class for, 3 an unreadable tokenizer,
4 storage, 5 a checkpoint that is missing, damaged or of another shape, or an export that failed its trial,
130 stopped by Ctrl+C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py has it, and before torch is loaded

from pretrain.checks import Check, publish
from pretrain.errors import TrainerError
from pretrain.export import export
from pretrain.hf_config import DTYPES
from pretrain.pretrained import CACHE_DIR, open_checkpoint

EXIT_INTERRUPTED = 130  # as a shell counts a program that ended by SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    try:
        return run(options, console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl+C", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or gs:// url of a checkpoint or of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    parser.add_argument("--max_shard_gb", type=_positive, default=5.0, metavar="GB", help="most GB of one file (5)")
    parser.add_argument(
        "--cache_dir", type=Path, default=CACHE_DIR, metavar="FOLDER", help=f"where a bucket's is kept ({CACHE_DIR})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> int:
    """Export, and say what was found."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    reader = open_checkpoint(options.checkpoint, cache_dir=options.cache_dir)
    exported = export(
        reader, options.out, dtype=options.dtype, max_shard_bytes=int(options.max_shard_gb * 1e9), say=say
    )
    say(
        f"done: {options.out} is a {exported.architecture} of {exported.bytes / 1e6:,.1f} MB in {options.dtype}; "
        f"loaded by {exported.loaded_by}, its logits differ by at most {exported.logits_difference:.1e} "
        f"(allowed {exported.allowed_difference:.1e})"
    )
    if not options.json:
        return 0
    allowed = exported.allowed_difference
    check = Check("logits_difference", exported.logits_difference, "≤", allowed, "logit")
    details = {
        "checkpoint": str(reader.manifest.name),
        "out": str(options.out),
        "dtype": options.dtype,
        "architecture": exported.architecture,
        "files": exported.files,
        "bytes": exported.bytes,
        "loaded_by": exported.loaded_by,
    }
    return publish("export_hf", [check], as_json=True, details=details)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
