"""What the doctor tries with torch: what it sees, whether its kernels and its compiler work, how fast ranks reduce."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import torch

from pretrain import memory, plan
from pretrain.compiler import compiler_problem
from pretrain.config import EngineConfig
from pretrain.doctor import Finding, fail, ok, skip, warn
from pretrain.engine.base import PRECISION_DTYPES
from pretrain.errors import ConfigError
from pretrain.gpus import match_gpu
from pretrain.hardware import check_precision, device_name
from pretrain.kernels import Masking, choose_attention
from pretrain.listings import size_text
from pretrain.memory import COMPUTE_BYTES, Setup
from pretrain.plan import GB, Gpu
from pretrain.processes import end_with_parent

FP8_CAPABILITY, BF16_CAPABILITY = (8, 9), (8, 0)
PRODUCT_ROWS = 256
PROBE_SHAPE = (2, 4, 128)  # B, n_head, T of the attention that is tried
SLOW_SHARE = 0.3  # of the predicted time of a step, that reducing its gradients alone would take
REDUCE_TIMEOUT_S = 60.0
CPU_RANKS = 2


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build(gpus: int) -> Finding:
    """Torch itself, and whether it sees the GPUs.

    Args:
        gpus: that the driver shows to this process.
    """
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    what = f"{torch.__version__}, {built}"
    if not gpus:
        return ok("torch", f"{what}, {torch.get_num_threads()} threads on {device_name(torch.device('cpu'))}")
    if not torch.version.cuda:
        mend = "Install a CUDA build: TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 bash setup_env.sh"
        return fail("torch", ConfigError(f"{what}, on a machine with {gpus} GPUs", mend))
    try:
        torch.cuda.init()
    except RuntimeError as error:
        mend = "Its CUDA must not be newer than the driver's: update the driver, or take an older CUDA build of torch."
        return fail("torch", ConfigError(f"{what} can't use the GPUs: {_first_line(error)}", mend))
    seen = torch.cuda.device_count()
    if seen < gpus:
        mend = "See CUDA_VISIBLE_DEVICES, and nvidia-smi for a GPU that has dropped out."
        return fail("torch", ConfigError(f"{what} sees {seen} of {gpus} GPUs", mend))
    return ok("torch", f"{what}, cuDNN {torch.backends.cudnn.version()}, sees {seen} GPUs")


def precision(wanted: str) -> Finding:
    """Whether the device trains in the precision, and multiplies in it rightly; of fp8 in bf16, which its other
    products are in.

    Args:
        wanted: fp32, bf16, fp16 or fp8.

    Raises:
        ConfigError: it can't.
    """
    where = device()
    check_precision(where, wanted)
    tried = "bf16" if wanted == "fp8" else wanted
    rows = torch.linspace(-1, 1, PRODUCT_ROWS * PRODUCT_ROWS, device=where).view(PRODUCT_ROWS, PRODUCT_ROWS)
    exact = rows.double().cpu() @ rows.double().cpu()
    product = (rows.to(PRECISION_DTYPES[wanted]) @ rows.to(PRECISION_DTYPES[wanted])).double().cpu()
    if not torch.allclose(product, exact, rtol=0.02, atol=0.5):
        mend = "Is it the right build of torch for this device? Run bash setup_env.sh."
        return fail("precision", ConfigError(f"a matrix product in {tried} is wrong on {device_name(where)}", mend))
    said = f"{tried} multiplies rightly" + ("; fp8 products were not tried" if wanted == "fp8" else "")
    if where.type == "cpu":
        return ok("precision", f"{said} on the CPU, which trains in fp32 and bf16")
    capability = torch.cuda.get_device_capability(where)
    able = [name for name, least in (("bf16", BF16_CAPABILITY), ("fp8", FP8_CAPABILITY)) if capability >= least]
    words = ", ".join([f"compute capability {capability[0]}.{capability[1]}", "fp16", *able])
    advice = "; bf16 needs no loss scale: --precision bf16" if wanted == "fp16" and "bf16" in able else ""
    return ok("precision", f"{said} ({words}){advice}")


def attention(requested: str, wanted: str, head_dim: int, masking: Masking | None = None) -> Finding:
    """The kernel that the model will get, forward and backward, and on a GPU which fused ones run there.

    Args:
        requested: model.attention.
        wanted: precision.
        masking: where documents are kept apart (data.document_mask).
    """
    where, dtype = device(), PRECISION_DTYPES[wanted]
    try:
        _, reason = choose_attention(requested, where, dtype, head_dim, masking)
    except ValueError as error:
        return fail("attention", ConfigError(str(error), "Choose another --model.attention, or auto."))
    if where.type == "cpu":
        return ok("attention", f"forward and backward run: {reason.partition(';')[0]}")
    from torch.nn.attention import SDPBackend

    backends = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    obstacles = {name: _backend_problem(backend, where, dtype, head_dim) for name, backend in backends.items()}
    running = [name for name, obstacle in obstacles.items() if not obstacle]
    what = f"forward and backward run: {reason}; torch's own kernels that run: {', '.join(running) or 'none'}"
    if running or wanted == "fp32":  # there is no fused one for fp32 on a GPU but the memory-efficient
        return ok("attention", what)
    return warn(
        "attention", f"{what} ({'; '.join(obstacles.values())})", "Slow: update the driver, or run setup_env.sh."
    )


def _backend_problem(backend: Any, where: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why one of torch's fused kernels does not run, or ''."""
    from torch.nn.attention import sdpa_kernel

    q, k, v = torch.ones(3, *PROBE_SHAPE, head_dim, device=where, dtype=dtype, requires_grad=True).unbind(0)
    try:
        with sdpa_kernel([backend]):
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.sum().backward()
        torch.cuda.synchronize(where)
    except RuntimeError as error:
        return _first_line(error)
    return ""


def compilation(asked_for: bool) -> Finding:
    """Whether torch.compile works.

    Args:
        asked_for: whether the model is to be compiled: train.compile, or fp8.
    """
    if not (problem := compiler_problem(device())):
        return ok("compile", "a compiled function and its gradient are what eager torch gives")
    missing = "a C++ compiler (Debian, Ubuntu: apt install g++)" if device().type == "cpu" else "Triton"
    goes_on = "training goes on without it" if asked_for else "it is off in this config"
    return warn("compile", f"torch.compile can't work here: {problem}", f"It needs {missing}; {goes_on}.")


def engine(config: EngineConfig) -> Finding:
    """Whether the engine can be imported and, on a CPU, has the compiler that DeepSpeed wants."""
    if config.name != "deepspeed":
        return ok("engine", f"{config.name}, of torch itself")
    from pretrain.engine import zero

    zero.prepare_import(device())
    try:
        import deepspeed
    except (ImportError, RuntimeError, OSError) as error:
        mend = "Run bash setup_env.sh, or choose --engine native."
        return fail("engine", ConfigError(f"DeepSpeed can't be imported: {_first_line(error)}", mend))
    what = f"DeepSpeed {deepspeed.__version__}, ZeRO-{config.zero_stage}"
    if device().type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        mend = "Install a C++ compiler (Debian, Ubuntu: apt install g++), or choose --engine native."
        return warn("engine", f"{what}: no compiler for its CPU op, the native engine stands in", mend)
    return ok("engine", what)


def gpu_memory(setup: Setup, forced: bool) -> Finding:
    """The plan's memory against the smallest GPU's.

    Args:
        forced: whether training is to begin although it can't fit (--force).
    """
    if device().type == "cpu":
        return skip("gpu_memory", "no GPU: see host_memory")
    smallest = min(range(torch.cuda.device_count()), key=lambda i: torch.cuda.get_device_properties(i).total_memory)
    properties = torch.cuda.get_device_properties(smallest)
    budget = plan.budget(setup, Gpu(properties.name, match_gpu(properties.name), properties.total_memory))
    what = f"{budget.required / GB:.1f} GB needed of {budget.available / GB:.1f} GB (predicted)"
    figures = {"required_gb": budget.required / GB, "available_gb": budget.available / GB}
    if budget.feasible:
        return ok("gpu_memory", f"{what}; the largest micro batch is {budget.largest_micro_size}", **figures)
    mend = plan.advice(setup, budget.gpu)
    if forced:
        return warn("gpu_memory", what, mend, **figures)
    return fail("gpu_memory", ConfigError(what, mend), **figures)


def reduction(setup: Setup, gpus: int, local_ranks: int) -> Finding:
    """All-reduce between the ranks of this node; without a GPU between two.

    Args:
        gpus: that the driver shows to this process.
        local_ranks: of the run, on this node.
    """
    if gpus and local_ranks == 1:
        return skip("all_reduce", "one GPU: nothing travels between ranks of this node")
    answer = _measure(local_ranks if gpus else CPU_RANKS)
    rate = float(answer["gb_per_s"])
    gradients = COMPUTE_BYTES[setup.precision] * sum(memory.parameter_sizes(setup.model))
    seconds = 2 * gradients / (rate * GB)
    what = f"{rate:.2f} GB/s between {answer['ranks']} ranks ({answer['backend']}): {size_text(gradients)} of "
    what += f"gradients take {seconds:.3g} s"
    share = _share_of_step(seconds, setup)
    if share is None or share < SLOW_SHARE:
        return ok("all_reduce", what, gb_per_s=rate)
    mend = "See nvidia-smi topo -m and NCCL_DEBUG=INFO: is NVLink in use?"
    return warn("all_reduce", f"{what}, {share:.0%} of a step's predicted time", mend, gb_per_s=rate)


def _measure(ranks: int) -> dict[str, Any]:
    """What pretrain.bandwidth prints on so many ranks.

    Raises:
        ConfigError: they can't reduce.
    """
    words = [sys.executable, "-m", "pretrain.launch", f"--nproc_per_node={ranks}", "-m", "pretrain.bandwidth"]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=REDUCE_TIMEOUT_S,
        preexec_fn=end_with_parent,
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    answers = [json.loads(line) for line in lines if line.startswith('{"ranks"')]
    if not answers:
        told = next((line for line in lines if "rror" in line), lines[-1] if lines else "nothing was said")
        mend = "NCCL_DEBUG=INFO tells more; see NCCL_P2P_DISABLE, NCCL_IB_DISABLE and NCCL_SOCKET_IFNAME."
        raise ConfigError(f"{ranks} ranks can't reduce together: {told.strip()[:200]}", mend)
    if not answers[0]["right"]:
        raise ConfigError(f"sums over {ranks} ranks are wrong", "Memory or a link is damaged: don't train here.")
    answer: dict[str, Any] = answers[0]
    return answer


def _share_of_step(seconds: float, setup: Setup) -> float | None:
    """Seconds as a share of a step's predicted time; None where nothing is known of the device's speed."""
    if device().type == "cpu":
        return None
    name = torch.cuda.get_device_name()
    gpu = Gpu(name, match_gpu(name), 0)
    if not gpu.peak or not plan.peak_tflops(gpu, setup.precision):
        return None
    tokens = setup.batch.global_size * setup.model.seq_len
    return seconds * plan.expected_speed(setup, gpu).tokens_per_second / tokens


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
