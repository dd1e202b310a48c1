"""Adapters: trained through the trainer, saved in PEFT's own folder, loaded back by plain PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from zotune.core.ledger import read_ledger
from zotune.hf.building import kind_of
from zotune.tuning import without_peft_warning

KINDS = {
    "lora": (LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), 5e-5, 1e-2),
    "prefix": (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), 1e-2, 1e-1),
    "prompt": (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", token_dim=16), 1e-3, 1e-2),
}


@pytest.fixture
def adapt(make_model):
    def adapt(kind, dtype=torch.float32):
        with torch.random.fork_rng(), without_peft_warning():
            torch.manual_seed(2)
            return get_peft_model(make_model(dtype), KINDS[kind][0])

    return adapt


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_in_the_standard_folder_and_loaded_by_plain_peft(
    kind, run, adapt, make_model, rows, tmp_path
):
    _, lr, eps = KINDS[kind]
    trainer = run(model=adapt(kind), learning_rate=None, save_strategy="steps", save_steps=4, max_steps=4)
    assert (trainer.args.learning_rate, trainer.args.eps) == (lr, eps)  # those of the source for this kind
    assert trainer.record()["trained"] == kind
    folder = tmp_path / "out" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "ledger.jsonl", "zotune.json"} <= names
    assert "model.safetensors" not in names
    with without_peft_warning():
        loaded = PeftModel.from_pretrained(make_model(), str(folder)).eval()
    ids = torch.tensor([rows[0]["input_ids"][:4]])
    with torch.no_grad():
        trained, again, fresh = (
            model(input_ids=ids).logits for model in (trainer.model.eval(), loaded, adapt(kind).eval())
        )
    assert torch.equal(trained, again)
    assert not torch.equal(trained, fresh)


def test_only_the_adapter_is_trained_and_under_its_canonical_names(run, adapt):
    model = adapt("lora", torch.bfloat16)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    trainer = run(model=model)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.named_parameters() if name in frozen)
    names = list(trainer.zo.weights.slots)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert {slot.tensor.dtype for slot in trainer.zo.weights} == {
        torch.float32
    }  # PEFT keeps adapters of bf16 models so
    assert trainer.args.eps == 1e-2


def test_resuming_adapters_is_bit_equal(run, adapt, same_weights, tmp_path):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "rule": "adam", "learning_rate": 1e-2}
    whole = run("whole", model=adapt("lora"), **given)
    resumed = run("cut", model=adapt("lora"), resume=str(tmp_path / "whole" / "checkpoint-3"), **given)
    same_weights(whole.model, resumed.model)
    assert read_ledger(tmp_path / "cut" / "ledger.jsonl") == read_ledger(tmp_path / "whole" / "ledger.jsonl")


def test_what_was_done_lies_beside_the_model(run, adapt, tmp_path):
    trainer = run(model=adapt("lora"))
    trainer.save_model(str(tmp_path / "saved"))
    record = json.loads((tmp_path / "saved" / "zotune.json").read_text())
    assert record == trainer.record()
    assert read_ledger(tmp_path / "saved" / "ledger.jsonl").weights is not None


def test_kinds_that_no_source_speaks_of_take_loras_numbers():
    class Config:
        peft_type = "IA3"

    class Model:
        peft_config = {"default": Config()}  # noqa: RUF012

    assert kind_of(Model()).name == "lora"
    assert kind_of(object()).name == "full"
