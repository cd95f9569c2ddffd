"""Named full fp32 tensors out of DeepSpeed's optimizers and into them: one class for each way it lays them out.

DeepSpeed has no call of its own that does all of it for each stage. What is private to it is used here, and in zero.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.engine.base import ParameterState, zero_moments
from pretrain.optim_config import ADAM_MOMENTS


class States(Protocol):
    """The fp32 tensors of a DeepSpeed engine, by parameter of its module."""

    def __init__(self, engine: Any) -> None: ...

    def begin(self, optimizer_steps: int) -> None:
        """Give every parameter optimizer state, with the step count set, before any is read or written."""

    def read(self, parameter: Tensor) -> ParameterState:
        """The whole tensors of one parameter: a collective."""

    def write(self, parameter: Tensor, whole: ParameterState) -> None:
        """Take over whole tensors, which every rank has, on the engine's device: the weight, and any moments."""

    def publish(self) -> None:
        """Bring what was written to the weights that compute. A collective."""


def states_of(engine: Any, stage: int) -> States:
    """What reads and writes the states of a DeepSpeedEngine of a ZeRO stage."""
    kinds: dict[int, type[States]] = {0: WholeStates, 1: FlatStates, 2: FlatStates, 3: PartitionedStates}
    return kinds[stage](engine)


def partition(skeleton: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Divide a skeleton over the ranks as ZeRO-3 wants it, one module's own parameters in memory at a time.

    Args:
        skeleton: on the meta device, in compute precision; its weights are whatever the memory held.
        settings: DeepSpeed's configuration.
    """
    import deepspeed

    divided: Any = None  # any parameter that DeepSpeed has divided can have it divide others
    for module in skeleton.modules():
        if not (parameters := list(module.parameters(recurse=False))):
            continue
        module.to_empty(device=device, recurse=False)
        if divided is None:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=parameters[0].dtype)
        else:
            divided.convert_to_zero_parameters(param_list=list(module.parameters(recurse=False)))
        divided = next(module.parameters(recurse=False))


class WholeStates:
    """ZeRO-0: every rank holds everything. In fp32 torch's AdamW itself, else over fp32 copies of the parameters."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self._adamw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._masters: dict[Tensor, Tensor] = {parameter: parameter for parameter in engine.module.parameters()}
        if optimizer is not self._adamw:
            for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                self._masters.update(zip(halves, masters, strict=True))

    def begin(self, optimizer_steps: int) -> None:
        zero_moments(self._adamw, optimizer_steps)

    def read(self, parameter: Tensor) -> ParameterState:
        master = self._masters[parameter]
        state = self._adamw.state[master]
        return {"weight": master.detach(), **{moment: state[moment] for moment in ADAM_MOMENTS}}

    def write(self, parameter: Tensor, whole: ParameterState) -> None:
        master = self._masters[parameter]
        for key, tensor in whole.items():
            (master if key == "weight" else self._adamw.state[master][key]).copy_(tensor)

    def publish(self) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)


class FlatStates:
    """ZeRO-1 and 2: a rank's share of all parameters is one flat tensor a parameter group."""

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer

    def begin(self, optimizer_steps: int) -> None:
        # DeepSpeed links by itself after the first parameter group's first step, when later groups have no state yet
        # and read as missing; done here, before any step, every group has it.
        zero_moments(self._zero.optimizer, optimizer_steps)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: Tensor) -> ParameterState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if torch.distributed.get_world_size() == 1:  # its share is the whole: no buffer to gather in, no reduction
            return {key: self._own(parameter, key) for key in ("weight", *ADAM_MOMENTS)}
        moments = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in ADAM_MOMENTS}
        return {"weight": safe_get_full_fp32_param(parameter), **moments}

    @staticmethod
    def _own(parameter: Any, key: str) -> Tensor:
        """A view of one tensor of the flat share."""
        fragment: Tensor = parameter._hp_mapping.get_hp_fragment(None if key == "weight" else key)
        return fragment.view_as(parameter)

    def write(self, parameter: Tensor, whole: ParameterState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.copy_(whole["weight"])
        safe_set_full_fp32_param(parameter, whole["weight"])
        for moment in whole.keys() - {"weight"}:
            safe_set_full_optimizer_state(parameter, whole[moment], moment)

    def publish(self) -> None:
        """Every rank has the whole weights already."""


class PartitionedStates:
    """ZeRO-3: a rank's share of each parameter, the parameters of a sub-group in one flat tensor."""

    def __init__(self, engine: Any) -> None:
        self._zero = engine.optimizer
        self._rank, self._world_size = torch.distributed.get_rank(), engine.world_size

    def begin(self, optimizer_steps: int) -> None:
        # AdamW's groups are empty but while DeepSpeed steps: the state goes by the flat tensors.
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self._zero.optimizer.state[flat]
            for moment in ADAM_MOMENTS:
                state.setdefault(moment, torch.zeros_like(flat))
            state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=flat.device)

    def read(self, parameter: Tensor) -> ParameterState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        moments = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in ADAM_MOMENTS}
        return {"weight": safe_get_full_fp32_param(parameter), **moments}

    def write(self, parameter: Tensor, whole: ParameterState) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        safe_set_local_fp32_param(parameter, self._share(whole["weight"]))
        for moment in whole.keys() - {"weight"}:
            safe_set_local_optimizer_state(parameter, self._share(whole[moment]), moment)

    def _share(self, whole: Tensor) -> Tensor:
        """This rank's part of a flattened tensor, the last ones padded; safe_set_full_* does not pad, and fails."""
        size = -(-whole.numel() // self._world_size)
        padded = F.pad(whole.flatten(), (0, size * self._world_size - whole.numel()))
        return padded.narrow(0, size * self._rank, size)

    def publish(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
