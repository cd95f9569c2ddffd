"""The FSDP engine: weights, gradients and moments are divided over the ranks (FSDP2, arXiv 2304.11277).

Each rank keeps its share of the fp32 master weights; a block's whole weights are gathered in compute precision when it
runs, and forgotten behind it. Forward passes are collectives: see `base.Engine.forward_is_collective`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.config import EngineConfig, OptimConfig
from pretrain.engine.base import (
    PRECISION_DTYPES,
    EngineState,
    Mark,
    ParameterState,
    StepResult,
    evaluate,
    in_order,
    is_skeleton,
    no_mark,
    nothing,
    split_targets,
    watched,
    zero_moments,
)
from pretrain.errors import ConfigError
from pretrain.optim import LossScale, build_optimizer, moments, set_learning_rate
from pretrain.ranks import Ranks


def make_mesh(engine: EngineConfig, device: torch.device, ranks: Ranks) -> DeviceMesh:
    """All ranks in a row, or for `hybrid` nodes × ranks of a node: shares are divided along the last dimension.

    Raises:
        ConfigError: hybrid, and the nodes have different numbers of ranks, or there is only one.
    """
    if engine.fsdp_shard == "full":
        return init_device_mesh(device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    per_node = ranks.local_world_size
    answers = ranks.exchange({"per_node": per_node, "local_rank": ranks.local_rank})
    expected = [{"per_node": per_node, "local_rank": rank % per_node} for rank in range(ranks.world_size)]
    if answers != expected or per_node == ranks.world_size:
        nodes = sum(answer["local_rank"] == 0 for answer in answers)
        what = f"engine.fsdp_shard is hybrid, which needs several nodes of as many ranks each; found {nodes}"
        mend = f"with {' + '.join(str(a['per_node']) for a in answers if a['local_rank'] == 0)} ranks: choose full."
        raise ConfigError(f"{what} {mend}")
    shape = (ranks.world_size // per_node, per_node)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, precision: str) -> FSDPModule:
    """Divide a model over the mesh, each of its `blocks` by itself, and what is left at the root."""
    policy = MixedPrecisionPolicy(
        param_dtype=PRECISION_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=policy)
    return root


class FsdpEngine:
    """A model under FSDP2; see engine.base.Engine for the methods.

    Args:
        model: the model, in fp32, on any device; or a skeleton of it, of which memory is taken for this rank's share
            alone.
        precision: fp32, bf16 or fp16.
    """

    name = "fsdp"
    forward_is_collective = True
    states_stay = False

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        precision: str,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.before_update: Callable[[], None] = nothing
        self.mark: Mark = no_mark
        skeleton = is_skeleton(model)
        self._module = model if skeleton else model.to(device)
        self._sharded = shard(self._module, make_mesh(engine, device, ranks), precision)
        if skeleton:
            self._module.to_empty(device=device)
        self._device = device
        self._clip = optim.clip
        self._reduces_at_the_end = engine.fsdp_reduce == "step"
        self._optimizer = build_optimizer(model.named_parameters(), optim)
        zero_moments(self._optimizer, 0)
        initial_scale = engine.initial_loss_scale if precision == "fp16" else 1.0
        self._loss_scale = LossScale(initial_scale, engine.loss_scale_window)
        self._scales_loss = precision == "fp16"
        self._optimizer_steps = 0

    def train_step(self, micro_batches: Sequence[Tensor], lr: float) -> StepResult:
        set_learning_rate(self._optimizer, lr)
        losses = []
        for number, tokens in enumerate(micro_batches, 1):
            if self._reduces_at_the_end:
                self._sharded.set_requires_gradient_sync(number == len(micro_batches))
            self.mark("forward")
            loss = watched(self._module(*split_targets(tokens, self._device)))
            losses.append(loss.detach())
            self.mark("backward")
            (loss * (self._loss_scale.scale / len(micro_batches))).backward()
        self.mark("optimizer")
        norm = self._gradient_norm()
        applied = self._update(norm)
        self.mark("other")
        return StepResult(torch.stack(losses).mean(), norm if applied else float("inf"), applied)

    def _gradient_norm(self) -> float:
        """Of all parameters, over all ranks, without the loss scale."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm) / self._loss_scale.scale

    @torch.no_grad()
    def _update(self, norm: float) -> bool:
        """Unscale, clip and step where the norm is finite; returns whether it was. Every rank has the same norm."""
        finite = norm < float("inf")  # False for NaN too
        if finite:
            factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
            factor /= self._loss_scale.scale
            if factor != 1.0:
                torch._foreach_mul_([local(p.grad) for p in self._module.parameters() if p.grad is not None], factor)
            self.before_update()
            self._optimizer.step()
            self._optimizer_steps += 1
        if self._scales_loss:
            self._loss_scale.update(finite)
        self._optimizer.zero_grad(set_to_none=True)
        return finite

    def evaluate(self, tokens: Tensor) -> float:
        return evaluate(self._module, tokens, self._device)

    @torch.no_grad()
    def parameter_states(self) -> Iterator[tuple[str, ParameterState]]:
        self._sharded.reshard()  # after an evaluation the root's weights are still whole, in compute precision
        for name, parameter in self._module.named_parameters():
            wholes = {moment: full(tensor) for moment, tensor in moments(self._optimizer.state[parameter]).items()}
            yield name, {"weight": full(parameter), **wholes}

    @torch.no_grad()
    def initialise(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self._module.named_parameters())
        for parameter, weight in zip(parameters.values(), in_order(weights, parameters), strict=True):
            take_share(parameter, weight, self._device)

    @torch.no_grad()
    def load(self, read: Callable[[str], ParameterState], state: EngineState) -> None:
        self.before_update()
        self._sharded.reshard()
        self._optimizer_steps = state.optimizer_steps
        zero_moments(self._optimizer, state.optimizer_steps)
        for name, parameter in self._module.named_parameters():
            states = read(name)
            take_share(parameter, states["weight"], self._device)
            for moment, tensor in moments(self._optimizer.state[parameter]).items():
                take_share(tensor, states[moment], self._device)
        if self._scales_loss:
            self._loss_scale.restore(state.loss_scale, state.finite_steps)

    def state(self) -> EngineState:
        if not self._scales_loss:
            return EngineState(self._optimizer_steps)
        return EngineState(self._optimizer_steps, self._loss_scale.scale, self._loss_scale.finite_steps)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, in the tensor's own memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the ranks: a collective."""
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def take_share(tensor: Tensor, whole: Tensor, device: torch.device) -> None:
    """Copy this rank's share out of a whole tensor that every rank has."""
    assert isinstance(tensor, DTensor)
    share = distribute_tensor(whole.to(device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    local(tensor).copy_(local(share))
