"""TRL's trainers, forward passes only."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import LlamaForSequenceClassification

from zotune.tuning import without_peft_warning

trl = pytest.importorskip("trl")
from zotune.hf import (  # noqa: E402
    ZODPOConfig,
    ZODPOTrainer,
    ZOMixin,
    ZOSettings,
    ZOSFTConfig,
    ZOSFTTrainer,
)

# TRL 1.16 asks transformers 5.23 for names that are on their way out, with or without zotune
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
TEXTS = ("a gripping film", "a dull film", "it was great", "it was terrible")
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def turn(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(scope="module")
def chats():
    return Dataset.from_list(
        [{"prompt": turn("user", text), "completion": turn("assistant", text[::-1])} for text in TEXTS * 4]
    )


@pytest.fixture(scope="module")
def preferences():
    return Dataset.from_list([
        {"prompt": turn("user", text), "chosen": turn("assistant", "great"), "rejected": turn("assistant", "dull")}
        for text in TEXTS * 4
    ])  # fmt: skip


@pytest.fixture
def sft(make_model, settings, tokenizer, chats):
    def train(folder="out", *, model=None, resume=None, trainer=None, cls=ZOSFTTrainer, **given):
        with without_peft_warning():
            made = cls(
                make_model() if model is None else model,
                settings(folder, cls=ZOSFTConfig, **given),
                train_dataset=chats,
                eval_dataset=chats.select(range(4)),
                processing_class=tokenizer,
                **(trainer or {}),
            )
        made.train(resume_from_checkpoint=resume)
        return made

    return train


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_first_order_defaults_of_trl_are_off():
    arguments = ZOSFTConfig(output_dir="out", use_cpu=True)
    assert not arguments.gradient_checkpointing
    assert not arguments.bf16
    assert arguments.learning_rate is None
    assert arguments.lr_scheduler_type == "constant"


def test_no_warning_of_deprecated_settings(recwarn):
    ZOSFTConfig(output_dir="out", use_cpu=True)
    ZODPOConfig(output_dir="out", use_cpu=True)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_an_sft_config_of_a_script_works_as_it_is(make_model, tokenizer, chats, tmp_path):
    given = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, max_length=32, report_to="none", disable_tqdm=True
    )
    trainer = ZOSFTTrainer(make_model(), given, train_dataset=chats, processing_class=tokenizer)
    trainer.train()
    assert trainer.args.max_length == 32
    assert not trainer.args.gradient_checkpointing
    assert not trainer.args.bf16
    assert trainer.zo.forwards == 2


def test_tokens_are_counted_once_and_metrics_are_of_training(sft):
    trainer = sft(
        max_steps=3, gradient_accumulation_steps=2, method_options={"n": 2}, eval_strategy="steps", eval_steps=3
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    dataset = trainer.train_dataset
    assert all(len(ids) > 4 for ids in dataset["input_ids"])
    per_epoch = sum(map(len, dataset["input_ids"]))
    assert lines[1]["num_tokens"] == per_epoch  # 16 rows, 8 a step
    assert lines[0]["num_tokens"] < lines[1]["num_tokens"] < lines[2]["num_tokens"]
    assert all("mean_token_accuracy" in line and "zo/rho" in line and "entropy" in line for line in lines)
    evaluation = next(line for line in trainer.state.log_history if "eval_loss" in line)
    assert "eval_mean_token_accuracy" in evaluation


def test_the_loss_is_that_of_the_completion(sft, make_model):
    """lr 0: the mean of the pair is the loss at the weights but for the curvature, eps squared."""
    trainer = sft(max_steps=1, learning_rate=0.0, eps=1e-4, per_device_train_batch_size=16)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    with torch.no_grad():
        ours = float(make_model()(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss)
    assert losses(trainer)[0] == pytest.approx(ours, rel=1e-4)  # eps^2 times the trace of the Hessian, and fp32


def test_micro_batches_of_one_batch_give_the_large_batch(sft):
    """As in test_trainer.py: sums in another order."""
    whole = sft("whole", per_device_train_batch_size=8, max_steps=2)
    split = sft("split", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)


def test_adapters_resume_bit_equal_and_are_loaded_by_plain_peft(sft, make_model, same_weights, tmp_path):
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = sft("whole", trainer={"peft_config": LORA}, **given)
    resumed = sft("cut", trainer={"peft_config": LORA}, resume=str(tmp_path / "whole" / "checkpoint-2"), **given)
    same_weights(whole.model, resumed.model)
    folder = tmp_path / "cut" / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").is_file()
    with without_peft_warning():
        loaded = PeftModel.from_pretrained(make_model(), str(folder))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, resumed.model.eval()(input_ids=ids).logits)
    card = (tmp_path / "cut" / "README.md").read_text()  # TRL writes one with every checkpoint
    assert "Trained with forward passes only" in card
    assert "- forward-only" in card


def test_packing(sft):
    trainer = sft(max_steps=2, packing=True, packing_strategy="wrapped", max_length=16)
    assert [len(ids) for ids in trainer.train_dataset["input_ids"][:10]] == [16] * 10
    assert trainer.zo.forwards == 4


def test_recipes_and_the_command_line_go_through_trls_own_parser(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: out\nuse_cpu: true\nmethod: fzoo\nmethod_options: {n: 4}\neps: 1e-2\npacking: true\n"
    )
    line = ["--config", str(recipe), "--eps", "0.5"]
    (arguments,) = trl.TrlParser(ZOSFTConfig).parse_args_and_config(line)
    assert (arguments.method, arguments.method_options, arguments.eps, arguments.packing) == (
        "fzoo",
        {"n": 4},
        0.5,
        True,
    )
    with pytest.raises(ValueError, match="epps"):
        trl.TrlParser(ZOSFTConfig).parse_args_and_config([*line, "--epps", "1"])


@dataclass
class ZORewardConfig(ZOSettings, trl.RewardConfig):
    """As docs/hf.md shows it."""


class ZORewardTrainer(ZOMixin, trl.RewardTrainer):
    """As docs/hf.md shows it."""

    arguments = ZORewardConfig


def test_other_trainers_can_be_mixed(make_model, settings, tokenizer, preferences):
    config = make_model().config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    trainer = ZORewardTrainer(
        LlamaForSequenceClassification(config),
        settings(cls=ZORewardConfig, max_steps=2),
        train_dataset=preferences,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.zo.forwards == 4
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[1]["num_tokens"] == pytest.approx(
        2 * lines[0]["num_tokens"], rel=0.3
    )  # rows differ in length, by less


@pytest.fixture
def dpo(make_model, settings, tokenizer, preferences):
    def train(folder="out", *, trainer=None, **given):
        with without_peft_warning():
            made = ZODPOTrainer(
                make_model(),
                args=settings(folder, cls=ZODPOConfig, **given),
                train_dataset=preferences,
                processing_class=tokenizer,
                **(trainer or {}),
            )
        made.train()
        return made

    return train


@pytest.mark.parametrize("reference", ["disabled adapter", "other model", "computed before"])
def test_dpo_never_perturbs_its_reference(dpo, make_model, reference):
    """Without learning, the policy is its reference up to the probes: the mean of the pair is log 2 but for eps squared,
    and the slope along the direction is that of the policy alone. A perturbed reference would make each loss log 2.
    """
    given = {
        "disabled adapter": {"trainer": {"peft_config": LORA}},
        "other model": {"trainer": {"ref_model": make_model()}},
        "computed before": {"trainer": {"ref_model": make_model()}, "precompute_ref_log_probs": True},
    }[reference]
    trainer = dpo(max_steps=2, learning_rate=0.0, eps=1e-4, method_options={"n": 2}, **given)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([0.6931, 0.6931], abs=5e-3)
    assert all(abs(line["zo/rho"]) > 1e-4 for line in lines)
    assert {"rewards/margins", "rewards/accuracies", "num_tokens"} <= lines[0].keys()
    assert trainer.zo.forwards == 8


def test_dpo_counts_tokens_once_and_moves(dpo, make_model):
    trainer = dpo(max_steps=2, per_device_train_batch_size=8, trainer={"ref_model": make_model()}, learning_rate=1e-4)
    lines = [line["num_tokens"] for line in trainer.state.log_history if "loss" in line]
    assert lines[1] == sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset
    )
    fresh = dict(make_model().named_parameters())
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in trainer.model.named_parameters())
