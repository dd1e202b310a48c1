"""A reward without a gradient: the text that the model writes is scored by an ordinary function.

python examples/hf_reward.py                    # the packaged SmolLM2-135M-Instruct; some minutes on two cores

The reward asks for short answers. It looks at the words that greedy decoding wrote, so no gradient reaches the weights;
zeroth-order steps ask only what the reward is. Docs: docs/hf.md.
"""

import argparse

import torch
from datasets import Dataset

from zotune.hf import ZOArguments, ZOTrainer
from zotune.models import load_model
from zotune.tuning import make_mode

QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Name a fruit.", "What do bees make?",
    "Who wrote Hamlet?", "What is water made of?", "How many legs has a spider?", "What is the opposite of hot?",
    "Name a colour.", "What does a baker do?", "Where do fish live?", "What comes after Monday?",
    "What is bread made of?", "Name a planet.", "Why do we sleep?", "What is two plus three?",
)  # fmt: skip


def brevity(text, tokens):
    """1 for an empty answer, near 0 for one that fills its tokens with words."""
    return 1.0 - len(text.split()) / tokens


class RewardTrainer(ZOTrainer):
    """Minus the mean reward of greedy answers. What is returned may be any number."""

    smooth = False  # rewards jump where another word is chosen
    loss_is_scaled_for_ga = False  # a mean over the micro-batch
    new_tokens = 16

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        written = model.generate(
            **inputs, max_new_tokens=self.new_tokens, do_sample=False, use_cache=True,
            pad_token_id=self.processing_class.pad_token_id,
        )  # fmt: skip
        answers = self.processing_class.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        loss = -sum(brevity(answer, self.new_tokens) for answer in answers) / len(answers)
        loss = torch.tensor(loss, dtype=torch.float64)
        return (loss, {}) if return_outputs else loss


def main(model_name="smollm2-135m", steps=10, out="runs/hf_reward", new_tokens=16, **settings):
    model, tokenizer = load_model(model_name)
    tokenizer.padding_side = "left"
    model = make_mode("prefix", {"tokens": 5}).attach(model, seed=0)

    def collate(rows):
        chats = [[{"role": "user", "content": row["question"]}] for row in rows]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))

    trainer = RewardTrainer(
        model,
        ZOArguments(**{
            "output_dir": out, "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1.0,
            "engine": "in_place",  # perturb once for all the forwards of an answer
            "remove_unused_columns": False,  # the collator wants the question
            "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "use_cpu": not torch.cuda.is_available(), **settings,
        }),
        train_dataset=Dataset.from_list([{"question": question} for question in QUESTIONS]),
        data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.new_tokens = new_tokens
    before = reward_now(trainer)
    trainer.train()
    after = reward_now(trainer)
    trainer.save_model()
    print(f"mean reward: {before:.3f} before, {after:.3f} after {trainer.zo.forwards} queries")
    return before, after


@torch.no_grad()
def reward_now(trainer):
    """The mean reward over all questions."""
    trainer.model.eval()
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader(trainer.train_dataset)]
    return -sum(float(trainer.compute_loss(trainer.model, batch)) for batch in batches) / len(batches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="runs/hf_reward")
    given = parser.parse_args()
    main(given.model, given.steps, out=given.out)
