"""Matrix products in fp8, by torchao: which layers take part, and their conversion.

Each converted layer scales its input, its weight and the gradient of its output by one number each (tensorwise), found
anew at every product, and multiplies them in fp8 (Micikevicius et al. 2022, arXiv 2209.05433). What is stored stays as
it is: compute weights are bf16, master weights fp32, and a converted layer's parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

MULTIPLE = 16  # the hardware multiplies matrices of such sides in fp8


def fp8_layers(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers that take part: those of all `blocks` but the first and the last, of fitting sides.

    The head, the embeddings and the blocks next to them are the most sensitive to rounding, and few of the FLOPs.
    """
    blocks = getattr(model, "blocks", ())
    for number, block in enumerate(blocks):
        if number in (0, len(blocks) - 1):
            continue
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
                yield f"blocks.{number}.{name}"


def convert(model: nn.Module, *, emulate: bool = False) -> int:
    """Have the model's layers multiply in fp8, in place; returns how many do.

    Args:
        model: on any device, the meta device too.
        emulate: multiply what was rounded to fp8 in full precision: slow, and without the hardware.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = set(fp8_layers(model))
    config = Float8LinearConfig(emulate=emulate)  # as it comes: tensorwise, scaled by the tensor at hand
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _layer, name: name in chosen)
    return len(chosen)
