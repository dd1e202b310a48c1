"""ZOTrainer: transformers.Trainer, forward passes only."""

from typing import Any

from zotune.hf.arguments import transformers
from zotune.hf.mixin import ZOMixin

Parent: Any = transformers.Trainer


class ZOTrainer(ZOMixin, Parent):  # type: ignore[misc]
    """transformers.Trainer with forward passes only: same arguments, same loop, same folders.

        trainer = ZOTrainer(model, ZOArguments(output_dir="out", max_steps=1000), train_dataset=rows)
        trainer.train()

    TrainingArguments work too: what was not set in them takes the defaults of ZOArguments. A `compute_loss` of one's own
    may return any number: no gradient is asked for.
    """
