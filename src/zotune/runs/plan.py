"""What a run will do and cost, in words, before it starts."""

from typing import Any

from zotune.core.options import options_of
from zotune.optim.optimizer import ZO
from zotune.runs.job import Job


def plan(job: Job, opt: ZO) -> dict[str, str]:
    """Facts by name, for the display."""
    config, group = job.config, opt.param_groups[0]
    extra = opt.weights.extra_bytes()
    lr_source = job.mode.source if config.lr is None else "given"
    eps_source = "default for these weights: MeZO's 1e-3, or 1e-2 for bf16" if job.mode.eps is None else job.mode.source
    eps_source = eps_source if config.eps is None else "given"
    sites = [slot.site for slot in opt.weights]
    forwards = opt.method.forwards_for(sites)
    kept = [opt.method.extra_bytes(sites), opt.rule.extra_bytes(sites)]
    return {
        "model": f"{config.model}, {sum(p.numel() for p in job.model.parameters()):,} parameters",
        "trained": f"{job.mode.name}: {opt.weights.numel:,} parameters in {len(opt.weights.slots)} tensors",
        "task": f"{config.task} ({job.task.kind}): {len(job.train)} training rows, {len(job.heldout)} held out",
        "method": f"{_named(opt.method)}, {opt.method.paper}; rule {_named(opt.rule)}{_folded(opt)}",
        "forwards": f"{forwards:g} a step, {forwards * config.steps:g} in all, batch {config.batch_size}",
        "lr, eps": f"{group['lr']:g} ({lr_source}), {config.schedule}; {group['eps']:g} ({eps_source})",
        "precision": job.precision.reason,
        "extra memory": f"method: {opt.method.extra_state}{_mib(kept[0])}; rule: {opt.rule.extra_state}{_mib(kept[1])}; "
        f"carried low-order bits: {extra / 2**20:.0f} MiB; engine {opt.engine.name}: {opt.engine.extra_memory}",
        "objective": f"{job.objective.name}; {job.scorer.loss_reason}",
        "run folder": str(job.folder.path),
    }


def _named(made: Any) -> str:
    options = ", ".join(f"{key}={value}" for key, value in options_of(made).items())
    return f"{made.name} ({options})" if options else str(made.name)


def _folded(opt: ZO) -> str:
    every = opt.folding.every if opt.folding.low_rank else 0
    return f"; moves of matrices are folded into the weights every {every} steps" if every else ""


def _mib(count: int) -> str:
    return f" ({count / 2**20:.1f} MiB)" if count else ""
