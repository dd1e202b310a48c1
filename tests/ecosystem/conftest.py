"""A tiny language model with a tokenizer in a folder, an adapter on it, and a task of the harness on local rows."""

import json
import warnings

import pytest
import torch
from tests.support.tiny_folder import BAD, GOOD, save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a causal language model, as `save_pretrained` writes it."""
    made = tmp_path_factory.mktemp("model")
    save_tiny_model(made)
    return made


@pytest.fixture(scope="session")
def adapter(folder, tmp_path_factory):
    """The folder of a LoRA adapter on that model, with the tokenizer beside it, as a run leaves it. B is not zero."""
    from peft import LoraConfig, get_peft_model

    from zotune.models import load_model
    from zotune.runs.run_folder import save_model

    model, tokenizer = load_model(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a name it is dropping
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=generator)
    made = tmp_path_factory.mktemp("adapter") / "model"
    save_model(made, adapted, tokenizer)
    return made


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """A YAML file of a task for lm-evaluation-harness: 12 film reviews, two answers. Nothing is fetched."""
    made = tmp_path_factory.mktemp("task")
    rows = [{"sentence": (GOOD if i % 2 else BAD)[i % 3], "label": i % 2} for i in range(12)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "films",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(made / "rows.jsonl")},
            "cache_dir": str(made / "cache"),
        },
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{sentence}} It was",
        "doc_to_choice": ["terrible", "great"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (made / "films.yaml").write_text(json.dumps(task))  # JSON is YAML
    return made / "films.yaml"
