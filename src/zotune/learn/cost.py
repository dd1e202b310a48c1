"""What learning will take, in words, before it starts."""

from zotune.finetuner.networks import NUMBERS
from zotune.learn.ground import Ground
from zotune.learn.learner import Learner

_RELEASED = 5  # the released code: theta, theta', the step, gradients, momentum; and a copy on the CPU


def memory(learner: Learner) -> dict[str, int]:
    """Bytes by purpose, beside a forward pass and the activations of a backward pass."""
    slots = list(learner.opt.weights)
    config = learner.config
    gradients = [slot.tensor.nbytes for slot in slots]
    return {
        "weights": sum(tensor.nbytes for tensor in learner.model.parameters()),
        "carried low-order bits": learner.opt.weights.extra_bytes(),
        "momentum": sum(slot.tensor.numel() * max(4, slot.tensor.element_size()) for slot in slots),
        # the meta-gradient's are freed as soon as they are read, so at most the largest lives; the trajectory's may be kept
        "gradients": sum(gradients) if config.gradients == "keep" else max(gradients),
        "networks": 3 * 4 * NUMBERS * len(slots),
    }


def plan(ground: Ground, learner: Learner) -> dict[str, str]:
    """What will be done, and what it costs."""
    config, weights, parts = ground.config, learner.opt.weights, memory(learner)
    trained = sum(slot.tensor.nbytes for slot in weights)
    sizes = "; ".join(f"{name} {_mib(count)}" for name, count in parts.items() if count)
    checkpoints = " with checkpoints" if config.checkpointing else ""
    return {
        "model": f"{config.model}, {weights.numel:,} trained numbers in {len(weights.slots)} tensors",
        "tasks": ", ".join(f"{name} ({len(job.train)} rows)" for name, job in ground.jobs.items()),
        "variant": f"{config.variant} ({_judged(learner)})",
        "visits": f"{ground.rounds * len(ground.jobs)}, each worth about 8 forward passes of {config.batch_size}; the model "
        f"returns to its start every {config.epochs_per_restart} epochs",
        "lr": f"networks {config.rate:g}, judged step {config.lr_update:g}, trajectory {config.lr_llm:g}; eps {config.eps:g}",
        "precision": next(iter(ground.jobs.values())).precision.reason,
        "memory": f"{sizes}; {_mib(sum(parts.values()))} in all, and the activations of "
        f"{config.micro_batch or config.batch_size} examples{checkpoints}. Numbers that a displacement does not give back "
        "are kept during one backward pass: few, the history counts them",
        "released code": f"{_RELEASED} to {_RELEASED + 1} copies of what is trained: {_mib(_RELEASED * trained)} or more",
        "on disk": f"while it runs, up to {_mib(2 * trained + parts['momentum'])} beside {config.out}",
        "folder": config.out,
    }


def _judged(learner: Learner) -> str:
    if not learner.corrected:
        return "everything but sigma is held constant"
    if learner.averaged:
        return "budget differentiated, scaled features, first-order part averaged"
    why = "as asked" if not learner.config.average else "the model has dropout"
    return f"budget differentiated, scaled features; first-order part not averaged: {why}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
