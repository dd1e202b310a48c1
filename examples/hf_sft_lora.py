"""Chat-style supervised fine-tuning of LoRA adapters with TRL's SFTTrainer, forward passes only.

python examples/hf_sft_lora.py                  # the packaged SmolLM2-135M-Instruct; some minutes on two cores

The model is taught to answer a question about a film review with one word. TRL applies the chat template and takes the
loss of the answers alone. Docs: docs/hf.md.
"""

import argparse

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict

from zotune.hf import ZOSFTConfig, ZOSFTTrainer
from zotune.models import load_model
from zotune.precision import native_bf16
from zotune.tasks.catalogue import find_task
from zotune.tasks.rows import load_rows
from zotune.tuning import make_mode

WORDS = ("negative", "positive")


def chat(row):
    """A row as TRL wants it: a prompt and a completion, both lists of messages."""
    question = f"Is this film review positive or negative? Answer in one word.\n{row['sentence']}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": WORDS[row["label"]]}],
    }


def reviews(count):
    """Rows of the packaged demo task: {"sentence", "label"}."""
    rows = load_rows(find_task("vader_movie"))
    return rows["train"][:count], rows["validation"][:100]


def main(model_name="smollm2-135m", steps=100, rows=None, out="runs/hf_sft_lora", **settings):
    train, heldout = (Dataset.from_list([chat(row) for row in part]) for part in (rows or reviews(500)))
    model, tokenizer = load_model(model_name)
    # or peft.get_peft_model(model, LoraConfig(...)), or `peft_config=LoraConfig(...)` below
    model = make_mode("lora", {"rank": 8, "alpha": 16.0}).attach(model, seed=0)
    trainer = ZOSFTTrainer(
        model,
        args=ZOSFTConfig(**{
            "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
            "max_length": 256, "eval_strategy": "steps", "eval_steps": max(1, steps // 2), "logging_steps": 10,
            "save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available(),
            "bf16": native_bf16(),  # autocast where the processor has bf16 products: three times as fast there
            **settings,
        }),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"held-out loss per answer token: {before:.3f} before, {after:.3f} after {trainer.zo.forwards} forwards")

    again, _ = load_model(model_name)  # what was saved is an ordinary PEFT adapter
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(again, out))
    trained = get_peft_model_state_dict(trainer.model)
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/hf_sft_lora")
    given = parser.parse_args()
    main(given.model, given.steps, out=given.out)
