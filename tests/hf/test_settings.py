"""ZOArguments: one dataclass in Python, YAML and on the command line; what cannot be honoured is refused with a reason."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

import zotune.hf
from zotune.errors import ConfigError, MissingExtraError
from zotune.hf import ZOArguments
from zotune.hf.arguments import settle_arguments
from zotune.hf.settings import read_options


def made(**given):
    return ZOArguments(output_dir="out", use_cpu=True, **given)


def test_first_order_defaults_are_replaced():
    arguments = made()
    assert arguments.learning_rate is None  # settled when the model is known
    assert arguments.lr_scheduler_type == "constant"
    assert arguments.max_grad_norm == 0.0
    assert not arguments.logging_nan_inf_filter
    assert not arguments.gradient_checkpointing
    assert not arguments.bf16
    assert arguments.method == "mezo"
    assert arguments.method_options == {}


def test_the_same_settings_in_python_yaml_and_on_the_command_line(tmp_path):
    options = {"n": 3, "sides": 1}
    python = made(method_options=options, eps=1e-2, learning_rate=1e-6, rule="momentum", rule_options={"beta": 0.5})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: out\nuse_cpu: true\nmethod_options: {n: 3, sides: 1}\neps: 1e-2\nlearning_rate: 1e-6\n"
        "rule: momentum\nrule_options: {beta: 0.5}\n"
    )
    (yaml,) = HfArgumentParser(ZOArguments).parse_yaml_file(recipe)
    line = "--output_dir out --use_cpu --method_options n=3,sides=1 --eps 1e-2 --learning_rate 1e-6 --rule momentum "
    (command,) = HfArgumentParser(ZOArguments).parse_args_into_dataclasses((line + "--rule_options beta=0.5").split())
    for name in ("method_options", "eps", "learning_rate", "rule", "rule_options"):
        assert getattr(yaml, name) == getattr(command, name) == getattr(python, name), name


@pytest.mark.parametrize("given", ["n=4, sides=1", '{"n": 4, "sides": 1}', "{n: 4, sides: 1}", {"n": 4, "sides": 1}])
def test_options_are_read_from_text_too(given):
    assert read_options("method_options", given) == {"n": 4, "sides": 1}


def test_small_numbers_within_text_are_numbers():
    """YAML reads 1e-6 as a word."""
    assert read_options("rule_options", "a=1e-6,b=true,c=word") == {"a": 1e-6, "b": True, "c": "word"}


@pytest.mark.parametrize("given", ["n4", "{n: ", 3])
def test_unreadable_options_are_refused(given):
    with pytest.raises(ConfigError, match="method_options"):
        read_options("method_options", given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"fp16": True}, "gradient scaler"),
        ({"max_grad_norm": 1.0}, "no gradient whose norm could be clipped"),
        ({"optim": "adafactor"}, "first-order optimizer"),
        ({"adam_beta2": 0.95}, "`rule_options` set their constants"),
        ({"optim_args": "a=1"}, "first-order optimizer"),
        ({"fsdp": "full_shard"}, "torchrun"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "torchrun"),
        ({"gradient_checkpointing": True}, "no backward pass"),
        ({"method": "mezzo"}, "Did you mean 'mezo'"),
        ({"method_options": {"m": 1}}, "no option 'm'"),
        ({"rule": "sdg"}, "Did you mean 'sgd'"),
        ({"rule": "momentum", "rule_options": "beta=2"}, "beta"),
        ({"noise": "pink"}, "pink"),
        ({"low_precision": "cary"}, "Did you mean 'carry'"),
        ({"engine": "diesel"}, "engine"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("inf")}, "eps must be positive and finite"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be at least 0 and finite"),
        ({"method_options": "n=[1"}, "method_options must be JSON"),
        ({"method": "lozo", "rule": "momentum_replayed"}, "Use rule 'momentum'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_reason(given, reason):
    with pytest.raises(ConfigError, match=reason):
        made(**given)


def test_all_refusals_are_told_at_once():
    with pytest.raises(ConfigError, match=r"fp16=True(.|\n)*max_grad_norm=0\.5(.|\n)*adam_epsilon"):
        made(fp16=True, max_grad_norm=0.5, adam_epsilon=1e-6)


def test_optim_can_only_stand_at_its_default():
    assert made(optim=TrainingArguments(output_dir="out", use_cpu=True).optim).method == "mezo"
    with pytest.raises(ConfigError, match="optim="):
        made(optim=OptimizerNames.SGD)


def test_training_arguments_keep_what_was_set_and_leave_first_order_defaults_behind(caplog):
    given = TrainingArguments(
        output_dir="here", use_cpu=True, learning_rate=3e-6, max_steps=7, bf16=True, eval_strategy="steps", eval_steps=2,
        weight_decay=0.1, seed=9,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        settled = settle_arguments(given, ZOArguments)
    for name in ("output_dir", "use_cpu", "learning_rate", "max_steps", "bf16", "eval_strategy", "eval_steps", "seed"):
        assert getattr(settled, name) == getattr(given, name), name
    assert settled.weight_decay == 0.1
    assert settled.lr_scheduler_type == "constant"
    assert settled.max_grad_norm == 0.0
    assert "max_grad_norm 1.0 -> 0.0" in caplog.text
    assert settle_arguments(settled, ZOArguments) is settled


def test_fields_of_a_scripts_own_class_stay(tmp_path):
    @dataclass
    class Own(TrainingArguments):
        alpha: float = 0.5

    made = settle_arguments(Own(output_dir=str(tmp_path), use_cpu=True, alpha=0.25), ZOArguments)
    assert isinstance(made, ZOArguments)
    assert made.alpha == 0.25


def test_a_learning_rate_that_nobody_chose_is_left_open():
    assert settle_arguments(TrainingArguments(output_dir="here", use_cpu=True), ZOArguments).learning_rate is None


def test_set_first_order_settings_are_refused_in_training_arguments_too():
    with pytest.raises(ConfigError, match="max_grad_norm"):
        settle_arguments(TrainingArguments(output_dir="here", use_cpu=True, max_grad_norm=0.5), ZOArguments)


def test_the_package_is_imported_without_the_libraries():
    code = "import sys, zotune.hf; assert not {'transformers', 'trl', 'peft', 'datasets', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize(
    ("library", "name", "extra"),
    [("transformers", "ZOArguments", "hf"), ("accelerate", "ZOArguments", "hf"), ("trl", "ZOSFTTrainer", "trl")],
)
def test_a_missing_library_is_an_error_that_names_the_extra(library, name, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for home in ("arguments", "trl"):
        monkeypatch.delitem(sys.modules, f"zotune.hf.{home}", raising=False)
    monkeypatch.delitem(vars(zotune.hf), name, raising=False)
    with pytest.raises(MissingExtraError, match=re.escape(f'pip install "zotune[{extra}]"')):
        getattr(zotune.hf, name)
