"""One visit: probe, judge the step, teach the networks, move the model on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.core.context import Context
from zotune.core.direction import Direction, Scaled
from zotune.core.noise import stream
from zotune.finetuner.networks import Networks, from_flat
from zotune.finetuner.profile import counted, moments
from zotune.learn.config import LearnConfig
from zotune.learn.displaced import displaced
from zotune.learn.meta import Size, Slopes, budgeted, of_networks, published
from zotune.learn.passes import backward_of, graph_mode, has_dropout, slopes
from zotune.learn.scaling import Scaling, of_start, unscaled
from zotune.learn.start import distance, equal_start, random_start
from zotune.learn.trajectory import Trajectory
from zotune.methods.zo_finetuner import ZOFineTuner
from zotune.optim.optimizer import ZO
from zotune.tasks.encoding import Encoded
from zotune.tasks.objectives import Objective, closure_for

CORRECTED = {"paper": False, "corrected": True}
FRESH: dict[str, Any] = {"names": [], "sigma": torch.empty(0), "losses": [0.0, 0.0]}  # of a task not visited yet


class Probe(ZOFineTuner):
    """The method as it is used, which also says what it did: learning sees the scales that training will see."""

    def features(self, ctx: Context) -> Tensor:
        """See `ZOFineTuner.features`."""
        self.asked = super().features(ctx)
        return self.asked

    def _direction(self, ctx: Context) -> tuple[Direction, dict[str, float]]:
        """As `ZOFineTuner` does it, noting what it did."""
        self.factors_now, self.nf = self.factors(ctx)
        self.u = ctx.gaussian()
        return Scaled(self.u, self.factors_now), {"nf": self.nf}


@dataclass(frozen=True)
class Visit:
    """What a visit was, for the log."""

    loss: float
    rho: float
    nf: float
    accepted: bool
    kept: int  # bytes kept to come back from theta'


class Learner:
    """The networks that learn, and what they learn from."""

    def __init__(self, model: Any, named: Any, config: LearnConfig, window: int) -> None:
        """Make the networks' start.

        Args:
            model: in its mode.
            named: (name, tensor) pairs or parameter groups, as ZO takes them.
            config: settings.
            window: visits between restarts.
        """
        self.model, self.config = model, config
        self.probe = Probe(networks="untrained", normalise=config.normalise, batch=config.batch_size)
        self.opt = ZO(named, self.probe, lr=0.0, eps=config.eps, seed=config.seed)
        sites = [slot.site for slot in self.opt.weights]
        names = [site.name for site in sites]
        self.corrected = CORRECTED[config.variant]
        self.counts = torch.tensor([counted(site, config.batch_size) for site in sites], dtype=torch.float64)
        # the budget's metric; tensors that nf leaves out count with their numbers
        numbers = torch.tensor([float(site.numel) for site in sites], dtype=torch.float64)
        self.metric = torch.where(self.counts > 0, self.counts, numbers)
        self.start = (equal_start if self.corrected else random_start)(names, config.seed)
        self.scaling = self._scaling()
        self.flat = self.start.flat().float()  # (n, 449): the numbers that learn, of scaled features
        self.size = Size()
        self.states: dict[str, dict[str, Any]] = {}
        self.averaged = self.corrected and config.average and not has_dropout(model)
        self.trajectory = Trajectory(
            self.opt.weights, lr=config.lr_llm, momentum=config.momentum, clip=config.clip, window=window,
            gradients=config.gradients,
        )  # fmt: skip

    @property
    def networks(self) -> Networks:
        """As they are saved and used: of raw features."""
        return self.scaling.fold(from_flat(self.start.names, self.flat))

    @property
    def moved(self) -> float:
        """Median over networks of the largest change of a number."""
        return float(distance(from_flat(self.start.names, self.flat), self.start).quantile(0.5))

    def forget_losses(self) -> None:
        """The next visit of each task is asked with losses of 0, as at the start of an epoch."""
        self.states = {task: {**state, "losses": [0.0, 0.0]} for task, state in self.states.items()}

    def restart(self) -> None:
        """The weights have gone back. As published the memory of scales and losses stays; corrected, it goes too."""
        if self.corrected:
            self.states = {}

    def visit(self, task: str, objective: Objective, batch: Sequence[Encoded], rate: float) -> Visit:
        """Learn from one batch; `rate` is the networks' learning rate."""
        config, weights = self.config, self.opt.weights
        self.probe.use(self.networks)
        self.probe.load_state_dict(self.states.get(task, FRESH))
        step = self.opt.step_number
        self.opt.step(closure_for(objective, batch, config.micro_batch))
        self.states[task] = self.probe.state_dict()
        last = self.opt.last
        assert last is not None
        loss = float(last.estimate.loss)
        if not last.accepted:
            return Visit(loss, float("nan"), self.probe.nf, False, 0)
        rho, backward = last.estimate.info["rho"], backward_of(objective, batch, config.micro_batch)
        u, seed = self.probe.u, _seed(config.seed, step)
        v = Scaled(u, self.probe.factors_now)
        with displaced(weights, -config.lr_update * rho * v) as kept, self._graph(dropout=False):
            moved = slopes(weights, backward, seed, u)
        with self._graph(dropout=True):
            here = self.trajectory.visit(backward, seed, u if self.averaged else None)
        self._teach(self.states[task]["sigma"].double(), Slopes(rho, moved, *(here or ())), rate)
        return Visit(loss, rho, self.probe.nf, True, kept.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the weights."""
        return {
            "flat": self.flat,
            "size": [self.size.total, self.size.weight, self.size.seen],
            "states": self.states,
            "trajectory": self.trajectory.state_dict(),
            "optimizer": self.opt.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.opt.load_state_dict(state["optimizer"])
        self.flat, self.size, self.states = state["flat"], Size(*state["size"]), state["states"]
        self.trajectory.load_state_dict(state["trajectory"])

    # ------------------------------------------------------------------------------------------------------------------

    def _scaling(self) -> Scaling:
        if not self.corrected:
            return unscaled(len(self.start.names))
        return of_start([moments(slot.storage.read(slot, slot.site).detach()) for slot in self.opt.weights])

    def _graph(self, dropout: bool) -> Any:
        return graph_mode(self.model, dropout=dropout, checkpointing=self.config.checkpointing)

    def _teach(self, sigma: Tensor, found: Slopes, rate: float) -> None:
        """One step of plain SGD on all networks."""
        networks = from_flat(self.start.names, self.flat)
        if self.corrected:
            d = budgeted(sigma, found, self.counts, lr=self.config.lr_update)
            d = self.size.normalised(d * (self.metric.mean() / self.metric))
        else:
            d = published(sigma, found, lr=self.config.lr_update, nf=self.probe.nf)
        change = of_networks(networks, self.scaling(self.probe.asked), d)
        self.flat = (self.flat.double() - rate * change).float()


def _seed(seed: int, step: int) -> int:
    """Of dropout in the backward passes of a visit."""
    high, low = stream(seed, "learning", step).key
    return (high << 31) ^ low
