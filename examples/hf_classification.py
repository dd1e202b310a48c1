"""Sentiment of film reviews with ZOTrainer: the usual script of transformers, forward passes only.

python examples/hf_classification.py            # the packaged SmolLM2-135M; some minutes on two cores

The model is asked to go on after "... It was", and the loss is the cross entropy between the two words "great" and
"terrible". Docs: docs/hf.md.
"""

import argparse

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorWithPadding

from zotune.hf import ZOArguments, ZOTrainer
from zotune.models import load_model
from zotune.precision import native_bf16
from zotune.tasks.catalogue import find_task
from zotune.tasks.rows import load_rows

WORDS = (" terrible", " great")


class WordTrainer(ZOTrainer):
    """Compares two words at the last position. An ordinary override of transformers: nothing here is about zotune."""

    loss_is_scaled_for_ga = False  # a mean over the micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, logits_to_keep=1)
        scores = outputs.logits[:, -1, self.words].float()
        loss = F.cross_entropy(scores, labels)
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs["scores"], labels


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def reviews(count):
    """Rows of the packaged demo task: {"sentence", "label"}."""
    rows = load_rows(find_task("vader_movie"))
    return rows["train"][:count], rows["validation"][:200]


def main(model_name="smollm2-135m", steps=200, rows=None, out="runs/hf_classification", **settings):
    model, tokenizer = load_model(model_name)
    tokenizer.padding_side = "left"  # the last position is the one that answers

    def encode(row):
        return {**tokenizer(f"{row['sentence']} It was"), "labels": row["label"]}

    train, heldout = (Dataset.from_list(part) for part in (rows or reviews(1000)))
    train, heldout = (part.map(encode, remove_columns=part.column_names) for part in (train, heldout))
    arguments = ZOArguments(**{
        "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
        "learning_rate": 1e-5, "eval_strategy": "steps", "eval_steps": max(1, steps // 4), "logging_steps": 10,
        "save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available(),
        "bf16": native_bf16(),  # autocast where the processor has bf16 products: three times as fast there
        **settings,
    })  # fmt: skip
    trainer = WordTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    trainer.create_model_card()
    print(
        f"accuracy on {len(heldout)} held-out reviews: {before:.3f} before, {after:.3f} after {trainer.zo.forwards} forwards"
    )
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/hf_classification")
    given = parser.parse_args()
    main(given.model, given.steps, out=given.out)
