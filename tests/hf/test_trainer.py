"""ZOTrainer: the loop is transformers', the step is zotune's."""

import json
import math
import pathlib

import pytest
import torch
from tests.support.models import bits
from transformers import AutoModelForCausalLM

import zotune
from zotune.core.ledger import read_ledger
from zotune.errors import ConfigError
from zotune.hf import ZOTrainer
from zotune.optim.replaying import optimizer_for
from zotune.runs.job import Listener
from zotune.runs.rebuild import rebuild


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def collated(rows, indices):
    return {key: torch.tensor([rows[i][key] for i in indices]) for key in ("input_ids", "attention_mask", "labels")}


def test_a_run_is_the_plain_loop_bit_for_bit(run, make_model, rows, same_weights):
    """The same batches through zotune.ZO alone. The order of the rows is the trainer's own."""
    seen = []

    class Watching(ZOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            # how many labels a batch has is the trainer's business (transformers 5.0 counts those that nothing predicts)
            seen.append(
                {key: value.clone() for key, value in inputs.items()} | {"num_items_in_batch": num_items_in_batch}
            )
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = run(cls=Watching, method_options={"n": 2}, seed=3)
    model = make_model().train()
    opt = zotune.ZO(model.named_parameters(), "mezo", lr=1e-3, eps=1e-3, seed=3, method_options={"n": 2})
    plain = [float(opt.step(lambda batch=batch: model(**batch).loss)) for batch in seen]
    same_weights(trainer.model, model)
    assert len(seen) == 4
    assert losses(trainer) == torch.tensor(plain, dtype=torch.float32).tolist()  # the trainer adds them up in fp32
    assert trainer.zo.forwards == opt.forwards == 16


def test_no_gradient_exists_at_any_time_and_the_model_is_in_training_mode(run, make_model):
    class Watching(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            assert not loss.requires_grad
            assert self.model.training
            return loss

    trainer = run(cls=Watching, model=make_model().eval())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("size", "parts"), [(4, 2), (2, 4)])
def test_micro_batches_of_one_batch_give_the_large_batch(run, size, parts):
    """8 x 1 = 4 x 2 = 2 x 4, though the rows differ in length: the loss is divided by the labels of the whole batch.

    fp32 sums in another order differ by about 1e-7 of the loss; the slope divides that by 2 eps, lr 1e-3 takes it back.
    """
    whole = run("whole", per_device_train_batch_size=8)
    split = run("split", per_device_train_batch_size=size, gradient_accumulation_steps=parts)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert split.zo.forwards == whole.zo.forwards  # a query goes through all micro-batches
    assert split.record()["tokens"] == whole.record()["tokens"]


def test_micro_batches_without_a_count_are_averaged(run):
    """A loss that ignores num_items_in_batch is a mean over its micro-batch, and says so as transformers asks."""

    class Mean(ZOTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"]).logits
            return logits[:, -1, :5].square().mean()

    whole = run("whole", cls=Mean, per_device_train_batch_size=8)
    split = run("split", cls=Mean, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    # transformers' own older releases know no loss_is_scaled_for_ga: its default decides there
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("given", [
    {"method_options": {"n": 2}, "rule": "momentum", "rule_options": {"beta": 0.5}, "lr_scheduler_type": "cosine"},
    {"method": "lozo", "method_options": {"rank": 2, "interval": 4}, "gradient_accumulation_steps": 2},
    {"bf16_weights": True, "eps": 1e-2},
])  # fmt: skip
def test_resuming_from_a_checkpoint_is_bit_equal(run, make_model, same_weights, tmp_path, given):
    """Weights, carried bits, state of method and rule, schedule, order of the data, ledger: all as if uninterrupted.

    Step 3 of 8 lies inside an epoch, and inside lozo's refresh period.
    """
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, **given}
    dtype = torch.bfloat16 if given.pop("bf16_weights", False) else torch.float32
    whole = run("whole", model=make_model(dtype), **given)
    cut = run("cut", model=make_model(dtype), **given, trainer={"callbacks": [stop_at(5)]})
    assert cut.zo.step_number == 5
    resumed = run("cut", model=make_model(dtype), resume=str(tmp_path / "cut" / "checkpoint-3"), **given)
    same_weights(whole.model, resumed.model)
    assert losses(resumed) == losses(whole)
    assert_same_state(whole.zo, resumed.zo)
    one, other = (read_ledger(tmp_path / folder / "ledger.jsonl") for folder in ("whole", "cut"))
    assert one == other
    assert whole.record()["forwards"] == resumed.record()["forwards"]
    assert whole.record()["tokens"] == resumed.record()["tokens"]


def stop_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    return Stop()


def assert_same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    for group, its in zip(first["param_groups"], second["param_groups"], strict=True):
        assert same(group, its)
    for number, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(bits(value), bits(second["state"][number][key])), key


def same(one, other):
    """Equality of nested dicts and lists that hold tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(bits(one), bits(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_resuming_the_last_checkpoint_by_true(run, same_weights):
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = run("whole", **given)
    run("cut", **given, trainer={"callbacks": [stop_at(5)]})
    same_weights(run("cut", resume=True, **given).model, whole.model)


@pytest.mark.parametrize("ledger", ["ledger.jsonl", None])
def test_a_checkpoint_of_weights_alone_is_refused(run, tmp_path, ledger):
    """Else its steps would draw the noise of the first ones again."""
    run(save_strategy="steps", save_steps=2, save_only_model=True, ledger=ledger)
    with pytest.raises(ConfigError, match="save_only_model"):
        run(resume=str(tmp_path / "out" / "checkpoint-2"), ledger=ledger)


def test_resuming_with_other_settings_is_refused(run, tmp_path):
    run(save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(zotune.ZotuneError, match="method"):
        run(resume=str(tmp_path / "out" / "checkpoint-2"), method="es")


def test_the_ledger_rebuilds_the_trained_weights(run, make_model, same_weights, tmp_path):
    trainer = run(rule="momentum", lr_scheduler_type="linear", weight_decay=0.1)
    ledger = read_ledger(tmp_path / "out" / "ledger.jsonl")
    model = make_model()
    zotune.replay(optimizer_for(model.named_parameters(), ledger), ledger.entries)
    same_weights(trainer.model, model)
    assert ledger.weights is not None  # the run has ended, with this hash
    assert {entry.groups[0]["lr"] for entry in ledger.entries} != {1e-3}  # the schedule is in it


def test_the_command_line_replays_the_ledger(run, make_model, tokenizer, same_weights, tmp_path):
    """`zotune replay` rebuilds a trainer's run from the model's folder, and checks the hash."""
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    trainer = run(model=AutoModelForCausalLM.from_pretrained(base), rule="sign")
    said = rebuild(str(base), tmp_path / "out" / "ledger.jsonl", tmp_path / "rebuilt", Listener())
    assert "equal to the trained model's" in said
    same_weights(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "rebuilt"))


def test_a_second_run_moves_the_first_ones_ledger_aside(run, tmp_path):
    run(max_steps=2)
    run(max_steps=3, seed=1)
    assert len(read_ledger(tmp_path / "out" / "ledger.1.jsonl").entries) == 2
    assert len(read_ledger(tmp_path / "out" / "ledger.jsonl").entries) == 3


def test_no_ledger_if_none_is_wanted(run, tmp_path):
    run(ledger="none", save_strategy="steps", save_steps=2)
    assert not list(tmp_path.rglob("*.jsonl"))
    with pytest.raises(ConfigError, match="ledger=None"):
        run(resume=str(tmp_path / "out" / "checkpoint-2"))
    run(resume=str(tmp_path / "out" / "checkpoint-2"), ledger=None)


def test_training_goes_on_when_train_is_called_again(run):
    trainer = run(max_steps=2)
    trainer.args.max_steps = 3
    trainer.train()
    assert trainer.zo.step_number == 5
    assert len(read_ledger(trainer.zo.ledger.path).entries) == 5


def test_the_best_model_comes_back_and_old_checkpoints_go(run, make_model, same_weights, tmp_path):
    """A learning rate far too large: the best evaluation is the first."""
    trainer = run(
        learning_rate=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=4,
        load_best_model_at_end=True, save_total_limit=2,
    )  # fmt: skip
    evaluations = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert best != 4, evaluations
    kept = sorted(folder.name for folder in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{best}", "checkpoint-4"]
    same_weights(trainer.model, type(trainer.model).from_pretrained(tmp_path / "out" / f"checkpoint-{best}"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)
    assert trainer.record()["weights_of_step"] == best
    trainer.args.learning_rate = 1e-3
    trainer.train()  # from the best weights, with an optimizer and a ledger that begin there
    assert trainer.zo.step_number == 4


def test_what_is_logged(run):
    trainer = run(
        method_options={"n": 2}, gradient_accumulation_steps=2, max_steps=3, include_num_input_tokens_seen=True
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for step, line in enumerate(lines, start=1):
        assert line["zo/forwards"] == 4 * step
        assert line["zo/eps"] == 1e-3
        assert line["zo/accepted"] == 1.0
        assert line["zo/refused"] == 0
        assert line["num_input_tokens_seen"] == step * 2 * 4 * 9  # once, not once per query
        assert math.isfinite(line["zo/rho"])
        assert "grad_norm" not in line
    ledger = read_ledger(trainer.zo.ledger.path)
    assert [line["loss"] for line in lines] == pytest.approx(
        [sum(entry.losses) / 4 for entry in ledger.entries], rel=1e-6
    )
    last = trainer.state.log_history[-1]
    assert last["train_forwards"] == 12
    assert last["train_forwards_per_second"] == pytest.approx(
        12 / last["train_runtime"], rel=0.01
    )  # rounded in the log


def test_operations_are_those_of_forward_passes(run, monkeypatch):
    """2 N D for each query, those that look at the model included; 6 N D belongs to a backward pass."""
    calls = []

    class Counting(ZOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = run(cls=Counting, gradient_accumulation_steps=2, max_steps=3)
    parameters = trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 2 * parameters * sum(calls)
    assert trainer.record()["tokens_forwarded"] == sum(calls)
    assert len(calls) >= 2 * trainer.zo.forwards  # in two micro-batches; more at the first step, to look at the model


def test_dropout_is_the_same_in_all_queries_of_a_step_and_on(run, make_model):
    """With lr 0, and eps so small that only the masks could tell the probes apart."""
    model = make_model(dtype=torch.float64, attention_dropout=0.5)
    ledger = read_ledger(run(model=model, learning_rate=0.0, eps=1e-9, max_steps=3).zo.ledger.path)
    # slope times 2 eps: at most some 1e-7 for slopes below 100; another mask changes the loss by far more
    assert all(abs(plus - minus) < 1e-7 for plus, minus in (entry.losses for entry in ledger.entries))
    without = read_ledger(run("no", model=make_model(torch.float64), learning_rate=0.0, eps=1e-9).zo.ledger.path)
    assert abs(without.entries[0].loss - ledger.entries[0].loss) > 1e-4


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_need_not_be_a_mapping(run, kind):
    class Pairs(ZOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            ids, labels = inputs
            return model(input_ids=ids, labels=labels).loss

    def collate(rows):
        return kind(torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))

    class Mapped(ZOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    trainer = run(cls=Pairs, remove_unused_columns=False, trainer={"data_collator": collate})
    assert losses(trainer) == losses(run("mapped", cls=Mapped))


def test_a_loss_that_takes_its_labels_out_of_the_batch_finds_them_in_every_query(run):
    """As transformers' own does with label smoothing."""
    assert run(label_smoothing_factor=0.1, max_steps=1).zo.forwards == 2


def test_the_schedule_moves_the_learning_rate(run):
    trainer = run(lr_scheduler_type="linear", warmup_steps=2, max_steps=4)
    used = [entry.groups[0]["lr"] for entry in read_ledger(trainer.zo.ledger.path).entries]
    assert used == pytest.approx([0.0, 5e-4, 1e-3, 5e-4], rel=1e-12)  # a product of two numbers, through JSON


def test_defaults_come_with_their_source(run, capsys):
    trainer = run(learning_rate=None, max_steps=1, disable_tqdm=False)
    assert trainer.args.learning_rate == 1e-6
    assert trainer.args.eps == 1e-3
    assert "lr 1e-06 (MeZO's for full tuning of OPT, Table 16)" in capsys.readouterr().out


def test_eps_is_larger_for_bf16_weights(run, make_model):
    assert run(model=make_model(torch.bfloat16), max_steps=1).args.eps == 1e-2


def test_training_arguments_of_a_script_work_as_they_are(make_model, rows, tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=2, learning_rate=1e-4, disable_tqdm=True
    )
    trainer = ZOTrainer(make_model(), arguments, train_dataset=rows)
    trainer.train()
    assert trainer.zo.forwards == 4
    assert trainer.zo.param_groups[0]["lr"] == 1e-4


def test_a_loss_that_is_not_a_number_is_logged_and_leaves_the_weights_alone(run, make_model, same_weights):
    class Broken(ZOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss * 0.0 + 1.0

    with pytest.warns(UserWarning, match="Step 1 was refused"):
        trainer = run(cls=Broken, max_steps=2)
    assert math.isnan(losses(trainer)[1])
    assert trainer.zo.refused == 1
    same_weights(trainer.model, make_model())


def test_a_reward_needs_no_gradient(run):
    """Python numbers, and losses that jump."""

    class Counting(ZOTrainer):
        smooth = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen = model(input_ids=inputs["input_ids"]).logits.argmax(-1)
            return -float((chosen % 2).float().mean())

    trainer = run(cls=Counting, eps=0.05, rule="sign", learning_rate=1e-4)
    assert all(-1.0 <= loss <= 0.0 for loss in losses(trainer))
    assert any(loss != losses(trainer)[0] for loss in losses(trainer))


def test_optimizers_of_a_script(make_model, rows, settings, run):
    model = make_model()
    opt = zotune.ZO(model.named_parameters(), "fzoo", lr=1e-4)
    trainer = ZOTrainer(model, settings(max_steps=1), train_dataset=rows, optimizers=(opt, None))
    trainer.train()
    assert trainer.zo is opt
    assert opt.forwards == 9
    made = run("other", max_steps=1, trainer={"optimizer_cls_and_kwargs": (zotune.ZO, {"method": "fzoo", "eps": 1e-2})})
    assert made.zo.forwards == 9
    assert made.zo.param_groups[0]["eps"] == 1e-2
    assert "model.embed_tokens.weight" in made.zo.weights.slots  # noise is keyed by names


def test_a_script_s_own_optimizer_is_what_the_record_tells_of(run, make_model, rows, settings):
    model = make_model()
    opt = zotune.ZO(model.named_parameters(), lr=3e-4, eps=2e-3)
    trainer = ZOTrainer(model, settings(learning_rate=None), train_dataset=rows, optimizers=(opt, None))
    trainer.train()
    trainer.create_model_card()
    assert (trainer.record()["lr"], trainer.record()["eps"]) == (3e-4, 2e-3)
    card = pathlib.Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert "| lr | 0.0003 (given), constant |" in card


def test_a_named_optimizer_is_made_with_its_own_arguments(run):
    class Mine(zotune.ZO):
        pass

    given = (Mine, {"method": "fzoo", "lr": 1e-4, "weight_decay": 0.1})
    trainer = run(trainer={"optimizer_cls_and_kwargs": given}, lr_scheduler_type="linear")
    assert type(trainer.zo) is Mine
    told = trainer.record()
    assert (told["method"], told["lr"], told["weight_decay"], told["lr_source"]) == ("fzoo", 1e-4, 0.1, "given")
    assert trainer.zo.param_groups[0]["lr"] == 0.0  # the schedule's end


def test_optimizers_that_need_gradients_are_refused(make_model, rows, settings):
    model = make_model()
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=r"needs zotune\.ZO as its optimizer, got AdamW"):
        ZOTrainer(model, settings(), train_dataset=rows, optimizers=(adam, None))
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs"):
        ZOTrainer(model, settings(), train_dataset=rows, optimizer_cls_and_kwargs=(torch.optim.AdamW, {}))


def test_moves_that_wait_are_refused(make_model, rows, settings):
    """Evaluation, checkpoints and the best model read the tensors, which would lag behind."""
    model = make_model()
    try:
        opt = zotune.ZO(model.named_parameters(), "lozo", lr=1e-4, fold_every=5)
    except TypeError:
        pytest.skip("this ZO folds at once")
    with pytest.raises(ConfigError, match="fold_every"):
        ZOTrainer(model, settings(), train_dataset=rows, optimizers=(opt, None))


def test_several_visible_gpus_are_refused_with_the_line_that_works(make_model, rows, settings):
    arguments = settings()
    arguments._n_gpu = 2
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        ZOTrainer(make_model(), arguments, train_dataset=rows)


def test_settings_that_were_changed_behind_its_back_are_refused(make_model, rows, settings):
    arguments = settings()
    arguments.max_grad_norm = 1.0
    with pytest.raises(ConfigError, match="max_grad_norm"):
        ZOTrainer(make_model(), arguments, train_dataset=rows)


def test_settings_that_were_changed_after_the_trainer_was_made_are_refused(make_model, rows, settings):
    trainer = ZOTrainer(make_model(), settings(), train_dataset=rows)
    trainer.args.max_grad_norm = 1.0
    with pytest.raises(ConfigError, match="max_grad_norm"):
        trainer.train()


def test_losses_of_several_processes_are_averaged(make_model, rows, settings, monkeypatch):
    """What another process would have gathered is made up: twice the loss of this one."""
    trainer = ZOTrainer(make_model(), settings(max_steps=1), train_dataset=rows)
    accelerator = type(trainer.accelerator)
    monkeypatch.setattr(accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(accelerator, "gather", lambda self, value: torch.cat([value, 2 * value]))
    from zotune.hf.batch import MicroBatch, WholeBatch

    batch = collated(rows, range(4))
    with torch.no_grad():
        plain = float(trainer.model(**batch).loss)
        trainer.args.average_tokens_across_devices = False
        assert float(WholeBatch(trainer, trainer.model, [MicroBatch(batch, None, 1)]).loss()) == pytest.approx(
            1.5 * plain, rel=1e-6  # fp32 losses
        )  # fmt: skip


def test_weight_decay_follows_the_trainers_choice(run):
    class All(ZOTrainer):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if "norm" not in name and "embed" not in name]

    one = run("one", weight_decay=0.1, max_steps=1)
    assert [group["weight_decay"] for group in one.zo.param_groups] == [0.1]  # rules leave norms and biases alone
    two = run("two", weight_decay=0.1, max_steps=1, cls=All)
    assert [group["weight_decay"] for group in two.zo.param_groups] == [0.1, 0.0]
    assert "model.embed_tokens.weight" in two.zo.param_groups[1]["param_names"]


def test_trackers_get_the_numbers(run):
    """What report_to names is a callback that is given the logs."""
    from transformers import TrainerCallback

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run(trainer={"callbacks": [Tracker()]}, max_steps=2)
    assert [line["zo/forwards"] for line in seen if "zo/forwards" in line] == [2, 4]
    assert json.dumps(seen)  # plain numbers


def test_a_model_is_searched_for_hyperparameters_anew(make_model, rows, settings):
    """model_init: each call of train begins with a fresh model and a fresh optimizer."""
    trainer = ZOTrainer(args=settings(max_steps=2), train_dataset=rows, model_init=lambda: make_model())
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer) == first
    assert trainer.zo.step_number == 2


def test_compiled_models_keep_their_parameters(make_model, settings):
    from zotune.hf.building import build_optimizer

    arguments = settings(torch_compile=True, torch_compile_backend="eager")
    assert build_optimizer(arguments, make_model(), [], None).engine.name == "in_place"
