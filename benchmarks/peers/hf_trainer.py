"""The Trainer of transformers over its GPT-2.

Documented: TrainingArguments(bf16=…) and what it does by itself (fused AdamW, since version 5). Best: torch_compile.
"""

from __future__ import annotations

from typing import Any

import torch
from hf_model import build
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from worker import WARM_UP_STEPS, Conversation, Spec, count_parameters, read_spec, windows


class Windows(Dataset[dict[str, Tensor]]):
    """Each window less its last token: the model shifts the labels itself."""

    def __init__(self, spec: Spec) -> None:
        self._tokens = windows(spec)[:, :-1]
        self._labels = self._tokens.clone()
        self._labels[:, 0] = -100  # nobody predicts the first; said, the Trainer does not count it in its mean

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._labels[index]}


class Turns(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Stops the loop between its steps until the benchmark wants more of them."""

    def __init__(self, parameters: int) -> None:
        self._parameters = parameters
        self._talk = Conversation()
        self._orders = self._talk.orders()
        self._left, self._is_warm = WARM_UP_STEPS, False
        self.first_loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Count; at the end of a turn say how long it took and wait for the next one."""
        self._left -= 1
        if self._left:
            return control
        if self._is_warm:
            self._talk.say(**self._talk.taken())
        else:
            self._talk.say(parameters=self._parameters, first_loss=self.first_loss)
        self._is_warm = True
        self._left = next(self._orders, 0)
        control.should_training_stop = not self._left
        return control


class FirstLossTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """Keeps the first loss; else as it comes."""

    turns: Turns

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ever."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.turns.first_loss is None:
            self.turns.first_loss = float(loss) * self.args.gradient_accumulation_steps
        return loss


def main() -> None:
    """Train when told to."""
    spec = read_spec()
    model = build(spec)
    args = TrainingArguments(
        output_dir=spec.folder,
        max_steps=1_000_000,
        per_device_train_batch_size=spec.micro_size,
        gradient_accumulation_steps=spec.accumulation,
        bf16=spec.precision == "bf16",
        learning_rate=spec.lr,
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip,
        lr_scheduler_type="constant",
        torch_compile=spec.is_best,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    turns = Turns(count_parameters(model))
    trainer = FirstLossTrainer(model=model, args=args, train_dataset=Windows(spec), callbacks=[turns])
    trainer.turns = turns
    trainer.train()


if __name__ == "__main__":
    main()
