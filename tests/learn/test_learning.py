"""The run: what it leaves is used by training, resumes to the bit, covers every tensor, says how far it came."""

import json
import re
import warnings

import pytest
import torch
from tests.reference.zo_finetuner import as_module
from tests.support.models import CASES

from zotune.core.ledger import weights_hash
from zotune.errors import ConfigError, DataError, FinetunerError
from zotune.finetuner.folder import load_folder, save_folder
from zotune.finetuner.importer import read_released
from zotune.finetuner.names import assign
from zotune.finetuner.networks import NUMBERS, untrained
from zotune.learn.config import LearnConfig
from zotune.learn.cost import memory
from zotune.learn.ground import prepare
from zotune.learn.learner import Learner
from zotune.learn.learning import learn
from zotune.learn.start import equal_start
from zotune.models import load_model
from zotune.optim.optimizer import ZO
from zotune.runs.alone import alone_in
from zotune.runs.job import Listener

VARIANTS = pytest.mark.parametrize("variant", ["paper", "corrected"])
VISITS = 3 * 2 * 2  # epochs, batches of 4 in 8 rows, tasks


class Killed(Exception):
    pass


class Kill(Listener):
    """Stops a run as a kill does, after so many visits."""

    def __init__(self, after):
        self.after = after

    def step(self, step, loss, forwards):
        if step == self.after:
            raise Killed


def history_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@VARIANTS
def test_networks_move_and_the_folder_says_how_far(settings, tmp_path, variant):
    facts = learn(settings(variant=variant))
    networks, kept = load_folder(tmp_path / "learned")
    assert kept == json.loads(json.dumps({**kept, **facts}))
    history = history_of(tmp_path / "learned")
    assert [line["visit"] for line in history] == list(range(VISITS))
    assert sorted({line["task"] for line in history}) == ["sst2", "sst2_empty"]
    assert history[0]["moved"] > 0
    assert history[-1]["moved"] > 2 * history[0]["moved"]
    assert facts["learned"]["distance"]["median"] == history[-1]["moved"]
    assert facts["learned"]["distance"]["most"] > facts["learned"]["distance"]["median"]
    assert len(facts["learned"]["furthest"]) == 5
    assert facts["base_model"] == settings().model
    assert facts["recipe"]["variant"] == variant
    assert facts["recipe"]["visits"] == VISITS
    assert len(facts["shapes"]) == len(networks.names) == 20
    if (
        variant == "paper"
    ):  # raw features: the start is that of the control, so the distance can be checked from outside
        start = untrained(networks.names, 0)
        assert float((networks.flat() - start.flat()).abs().max()) == facts["learned"]["distance"]["most"]


@VARIANTS
def test_restarts_epochs_and_rates(settings, monkeypatch, variant):
    """Three epochs, restarts after two; 4 visits each. What each visit finds before it begins."""
    found, right = [], Learner.visit

    def visit(self, task, objective, batch, rate):
        weights = weights_hash((slot.site.name, slot.tensor) for slot in self.opt.weights)
        kept = {key: list(state["losses"]) for key, state in self.states.items()}
        found.append((weights, kept, rate, self.trajectory.rate, bool(self.trajectory.buffers)))
        return right(self, task, objective, batch, rate)

    monkeypatch.setattr(Learner, "visit", visit)
    learn(settings(variant=variant))
    weights, kept, rates, of_model, momentum = zip(*found, strict=True)
    assert weights[8] == weights[0]
    assert len(set(weights)) == VISITS - 1
    assert momentum == (False, *[True] * 7, False, *[True] * 3)
    assert of_model == pytest.approx([0.05 * (1 - k / 8) for k in [*range(8), *range(4)]])
    assert not kept[0]
    assert set(kept[4]) == {"sst2", "sst2_empty"}
    assert all(losses == [0.0, 0.0] for losses in kept[4].values())  # an epoch begins
    assert all(losses != [0.0, 0.0] for losses in kept[6].values())
    assert set(kept[8]) == (set() if variant == "corrected" else {"sst2", "sst2_empty"})
    falls = [1e-3 * (1 - k / VISITS) for k in range(VISITS)]
    assert rates == pytest.approx(falls if variant == "corrected" else [0.1] * VISITS)


@pytest.mark.parametrize(("variant", "after"), [("paper", 9), ("corrected", 4)])
def test_resumed_run_is_the_uninterrupted_one(settings, tmp_path, variant, after):
    """Killed within a window and after the restart; snapshots are taken every 3 visits."""
    whole = learn(settings(variant=variant))
    other = settings(variant=variant, out=str(tmp_path / "killed"))
    with pytest.raises(Killed):
        learn(other, Kill(after))
    assert not (tmp_path / "killed").exists()
    again = learn(other)
    assert not (tmp_path / "killed.learning").exists()
    one, two = (load_folder(tmp_path / name)[0] for name in ("learned", "killed"))
    assert one.digest() == two.digest()
    assert history_of(tmp_path / "learned") == history_of(tmp_path / "killed")
    assert again["learned"] == whole["learned"]


def test_another_run_in_the_same_place_is_refused(settings, tmp_path):
    with pytest.raises(Killed):
        learn(settings(), Kill(4))
    with pytest.raises(ConfigError, match=r"other settings \(eps was 0.001, now 0.01\)"):
        learn(settings(eps=0.01))
    learn(settings())
    told = []

    class Told(Listener):
        def say(self, message):
            told.append(message)

    assert learn(settings(), Told())["base_model"]
    assert "nothing to do" in told[0]
    with pytest.raises(ConfigError, match="made otherwise"):
        learn(settings(seed=1))


def test_training_uses_the_folder(settings, tmp_path, folders):
    """Every trained tensor of the base model has its network; scales in training are those that learning ended with."""
    learn(settings(variant="corrected", lr_mlp=0.01))
    model, _ = load_model(str(folders[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        opt = ZO(
            model.named_parameters(), "zo_finetuner", lr=1e-4, method_options={"finetuner": str(tmp_path / "learned")}
        )
        opt.step(lambda: model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss)
    assert opt.last.estimate.info["nf"] != 1.0


@VARIANTS
def test_learned_and_imported_networks_give_the_same_scales(settings, tmp_path, folders, variant):
    """Through torch.save of modules and the importer, and as they were saved: one path to scales, the same bits."""
    learn(settings(variant=variant))
    networks, _ = load_folder(tmp_path / "learned")
    torch.save({name: as_module(networks, i) for i, name in enumerate(networks.names)}, tmp_path / "released.pth")
    imported, origin = read_released(tmp_path / "released.pth")
    save_folder(tmp_path / "imported", imported, origin)
    ends = []
    for folder in ("learned", "imported"):
        model, _ = load_model(str(folders[0]))
        options = {"finetuner": str(tmp_path / folder)}
        opt = ZO(model.named_parameters(), "zo_finetuner", lr=1e-3, method_options=options)
        ids = torch.arange(8)[None]
        for _ in range(3):
            opt.step(lambda m=model, ids=ids: m(input_ids=ids, labels=ids).loss)
        ends.append([opt.method.state_dict()["sigma"], *(p.detach() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_corrected_begins_as_mezo(settings):
    """Equal scales of 1 for any features: the first direction is MeZO's to the bit."""
    ground = prepare(settings(variant="corrected"), Listener())
    learner = Learner(ground.model, ground.named, ground.config, 4)
    features = torch.randn(20, 5)
    assert torch.equal(learner.networks.sigma(features, range(20)), torch.ones(20))
    learner.visit("sst2", ground.jobs["sst2"].objective, ground.batch("sst2", 0), 1e-3)
    assert set(learner.probe.factors_now.values()) == {1.0}
    assert learner.averaged


def test_order_of_tasks_is_drawn_and_rows_wrap(settings):
    ground = prepare(settings(), Listener())
    orders = [tuple(ground.order(turn)) for turn in range(20)]
    assert len(set(orders)) == 2
    assert orders == [tuple(ground.order(turn)) for turn in range(20)]
    assert ground.rounds_per_epoch == 2
    assert ground.rounds == 6
    assert prepare(settings(shuffle=False), Listener()).order(3) == ["sst2", "sst2_empty"]


def test_memory_is_counted_before(settings):
    """20 tensors, 27,808 numbers: weights, momentum and gradients; backward passes run twice keep the largest alone."""
    for gradients in ("keep", "twice"):
        ground = prepare(settings(gradients=gradients), Listener())
        learner = Learner(ground.model, ground.named, ground.config, 4)
        parts = memory(learner)
        whole = 4 * 27808
        largest = 4 * 320 * 32
        assert parts["weights"] == parts["momentum"] == whole
        assert parts["gradients"] == (whole if gradients == "keep" else largest)
        learner.visit("sst2", ground.jobs["sst2"].objective, ground.batch("sst2", 0), 0.1)
        assert sum(buffer.nbytes for buffer in learner.trajectory.buffers.values()) == parts["momentum"]
        assert all(p.grad is None for p in ground.model.parameters())
        assert learner.flat.nbytes * 3 == parts["networks"] == 12 * NUMBERS * 20


def test_adapters_are_learned_and_found_under_their_names(settings, tmp_path, folders):
    facts = learn(settings(mode="lora", mode_options={"rank": 2}, epochs=1))
    assert len(facts["shapes"]) == 8
    assert all(".lora_" in name for name in facts["shapes"])
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in facts["shapes"]


def test_base_weights_inside_an_adapter_find_their_networks():
    """PEFT calls a wrapped module's own weight base_layer.weight."""
    plain = [name for name, _ in CASES["llama"](torch.float32).module.named_parameters()]
    wrapped = CASES["lora"](torch.float32).module.requires_grad_(True)
    opt = ZO([(n, p) for n, p in wrapped.named_parameters() if "lora_" not in n], lr=0.0)
    names = [slot.site.name for slot in opt.weights]
    assert any(".base_layer." in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = assign(plain, names)
    assert sorted(found) == list(range(len(plain)))
    assert [plain[number] for number in found] == [name.replace(".base_layer", "") for name in names]


def test_equal_start_is_one_everywhere():
    networks = equal_start(["a", "b"], 3)
    assert torch.equal(networks.sigma(10 * torch.randn(2, 5), range(2)), torch.ones(2))
    assert float(networks.w1.abs().sum()) > 0  # random, or all hidden numbers would learn alike


# ----------------------------------------------------------------------------------------------------------------------
# Refusals and the command


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"tasks": ""}, "at least one task"),
        ({"tasks": "sst2,sst2"}, "a task twice"),
        ({"variant": "papr"}, "Did you mean 'paper'"),
        ({"epochs": 0, "momentum": 1.0}, "epochs must be at least 1, got 0; momentum must be"),
        ({"lr_update": 0.0}, "teaches nothing"),
        ({"gradients": "twice", "micro_batch": 2}, "micro_batch goes with gradients 'keep'"),
        ({"precision": "fp16"}, "scaled loss"),
        ({"variant": "corrected", "normalise": False}, "leave normalise on"),
    ],
)
def test_settings_out_of_range(changed, match):
    with pytest.raises(ConfigError, match=match):
        LearnConfig(**{"tasks": "sst2", **changed})


def test_tasks_without_rows_or_gradient(settings, tmp_path):
    with pytest.raises(ConfigError, match="needs a folder for each task"):
        learn(settings(tasks="sst2,copa"))
    with pytest.raises(ConfigError, match="there is no task"):
        learn(settings(tasks="sst3"))
    counts = tmp_path / "counts.yaml"
    counts.write_text('prompt: "{sentence} It was"\noptions: [" terrible", " great"]\nobjective: accuracy\n')
    with pytest.raises(ConfigError, match="no gradient"):
        learn(settings(tasks=f"sst2,{counts}"))
    assert not (tmp_path / "learned.learning").exists()


def test_a_folder_that_is_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "learned").mkdir()
    (tmp_path / "learned" / "note").write_text("mine")
    with pytest.raises(FinetunerError, match="no fine-tuner"):
        learn(settings())
    assert (tmp_path / "learned" / "note").read_text() == "mine"


def test_command_says_the_cost_and_the_distance(command, settings, tmp_path):
    config = settings(epochs=1)
    names = ("model", "tasks", "data", "out", "epochs", "batch_size", "train_rows", "precision", "device")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", getattr(config, name))]
    printed = " ".join(command(*words, "--no-shuffle", "--clip", "none", "--variant", "corrected").output.split())
    recipe = load_folder(config.out)[1]["recipe"]
    assert (recipe["shuffle"], recipe["clip"], recipe["lr_mlp"]) == (False, None, 1e-3)
    for text in ("20 tensors", "memory", "momentum 109 KiB", "released code", "moved", "never changed", "MeZO: 1"):
        assert text in printed
    assert "--method zo_finetuner" in printed
    with pytest.raises(ConfigError, match="clip must be of type float, or none; got 'much'"):
        command(*words, "--clip", "much")


@pytest.mark.parametrize("mode", ["head", "prompt", "prefix"])
def test_modes_of_few_tensors_end_in_a_folder(settings, tmp_path, mode):
    """One network: torch lets the stride of a single number be anything. A prefix: no checkpoints, which read it twice."""
    options = {} if mode == "head" else {"tokens": 2}
    learn(settings(mode=mode, mode_options=options, tasks="sst2", epochs=2, epochs_per_restart=1))
    networks, _ = load_folder(tmp_path / "learned")
    assert len(networks.names) >= 1


def test_one_process_at_a_time(settings, tmp_path):
    with alone_in(tmp_path / "learned.learning"), pytest.raises(ConfigError, match="Another process is at work"):
        learn(settings())
    learn(settings())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("learn.json", b"x"),
        ("learn.json", b"[]"),
        ("snapshot.safetensors", b""),
        ("snapshot.safetensors", b"PK\x03\x04"),
    ],
)
def test_damaged_files_of_a_run_are_named(settings, tmp_path, name, content):
    with pytest.raises(Killed):
        learn(settings(), Kill(4))
    (tmp_path / "learned.learning" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(name)} is damaged"):
        learn(settings())


def test_damaged_weights_for_restarts_are_named(settings, tmp_path):
    with pytest.raises(Killed):
        learn(settings(), Kill(4))
    (tmp_path / "learned.learning" / "start.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"start\.safetensors cannot be read"):
        learn(settings())
