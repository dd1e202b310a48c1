"""ZO: a method, a rule and an engine put together as a `torch.optim.Optimizer`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim uses it: does not import dynamo

from zotune.core.context import Context, Estimate
from zotune.core.ledger import Entry, Ledger, sites_hash
from zotune.core.noise import check_kind
from zotune.core.step import Closure, Engine, Method, Outcome, Rule, settle
from zotune.core.weights import Weights
from zotune.engines import make_engine
from zotune.errors import ClosureError
from zotune.methods import make_method
from zotune.optim.folding import Folding
from zotune.optim.moving import move
from zotune.optim.pairing import check_folding, check_pair
from zotune.optim.parameters import (
    check_hyperparameters,
    default_eps,
    hyperparameters_of,
    named_groups,
    warn_small_eps,
    whole,
)
from zotune.optim.patience import Patience
from zotune.optim.querying import context_of
from zotune.optim.refusing import Refusing
from zotune.optim.saving import NO_STATE, describe, parts_of_state, refuse_lost_moves, refuse_other_kind, take_up
from zotune.optim.standing import Standing
from zotune.rules import make_rule


class ZO(Refusing):
    """Zeroth-order optimizer: forward passes only, no gradients.

        opt = zotune.ZO(model.named_parameters(), method="mezo", lr=1e-6, eps=1e-3)
        for batch in data:
            loss = opt.step(lambda: model(**batch).loss)

    The closure runs one forward pass and returns one number; it is called several times a step and must use the same
    batch each time. It needs no `backward`, no `torch.no_grad` and no `zero_grad`. Dropout masks are the same in all
    queries of a step. (`grzo` needs one loss per example instead.) `lr`, `eps` and `weight_decay` live in the parameter
    groups, so schedulers work.

    Args:
        params: `model.named_parameters()`, best; or tensors, or parameter groups. Noise is keyed by names: without
            names it depends on the order. Tensors that do not require grad are left out.
        method: a name (see `zotune.methods.METHODS`) or a method object.
        lr: learning rate. MeZO's for full tuning of OPT: 1e-6 or 1e-7 (its Table 16).
        eps: perturbation scale; by default 1e-3, or 1e-2 if a trained tensor is bf16. Groups may have their own: then
            directions are scaled by eps of the group over eps of the first group.
        weight_decay: decoupled (w <- w - lr * weight_decay * w) under every rule; tensors are left out whose names contain
            "bias", "norm" or "ln_".
        seed: fixes all noise.
        rule: how an estimate moves the weights: a name (see `zotune.rules.RULES`) or a rule object.
        engine: "auto", "batched", "layerwise" or "in_place".
        noise: "normal" (table; the same bits everywhere), "gaussian" (exact) or "rademacher".
        low_precision: how fp16 and bf16 tensors take small updates: "carry" keeps 16 more bits a parameter.
        method_options: options of a method given by name.
        rule_options: options of a rule given by name.
        ledger: a `Ledger` or a path: writes down every loss, so that the run can be replayed.
        fold_every: write moves into the weights every so many steps (50, say; rule "sgd"). Those of low-rank methods add
            up as factors beside the matrices; a dense move is written by the next step's query as it reads the tensor,
            the same bits in fewer passes. BETWEEN TWO FOLDS THE MODULE'S OWN TENSORS LAG BEHIND: call `fold()` before
            anything else reads or writes them, or look inside `folded()`. 0: in each step.
        smooth: whether the closure returns a smooth function of the weights. False for a score that jumps (accuracy, a
            reward of text): engines are checked by comparing losses, and rounding alone moves such a score.

    Attributes:
        step_number, forwards, refused: steps taken; queries asked; steps whose numbers were not finite.
        last: what became of the last step: its estimate, its losses, and whether it was accepted.
        engine: `engine.reason` says which one it is and why.
        method, rule, weights, folding, ledger: the parts it is made of.

    Raises:
        ConfigError: a setting out of range, or moves that cannot wait. ParameterError: nothing to train, or packed tensors.
    """

    def __init__(
        self,
        params: Any,
        method: str | Method = "mezo",
        *,
        lr: float = 1e-6,
        eps: float | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        rule: str | Rule = "sgd",
        engine: str = "auto",
        noise: str = "normal",
        low_precision: str = "carry",
        method_options: dict[str, Any] | None = None,
        rule_options: dict[str, Any] | None = None,
        ledger: Ledger | str | Path | None = None,
        fold_every: int = 0,
        smooth: bool = True,
    ) -> None:
        groups = named_groups(params)
        self.method: Method = make_method(method, method_options)
        self.rule: Rule = make_rule(rule, rule_options)
        check_pair(self.method, self.rule)
        self.noise = check_kind(noise)
        tensors = [tensor for group in groups for _, tensor in group["params"]]
        eps = default_eps(tensors) if eps is None else eps
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "zo_step": 0,
            "zo_seed": whole("seed", seed),
            **NO_STATE,
            "zo_counts": {"updates": 0, "forwards": 0, "refused": 0},
        }
        super().__init__(groups, defaults)
        check_hyperparameters(self.param_groups)
        check_folding(whole("fold_every", fold_every), self.method, self.rule, self.param_groups)
        warn_small_eps(tensors, self.param_groups[0]["eps"])
        self.weights = Weights(self._named(), low_precision)
        self.folding = Folding(self.weights, fold_every, self.method.low_rank)
        self.engine: Engine = make_engine(engine, self.weights, self.method, smooth)
        self.ledger = Ledger(ledger) if isinstance(ledger, str | Path) else ledger
        self.last: Outcome | None = None
        self.patience = Patience()
        self._standing = Standing()
        self._asked: tuple[Context, Estimate] | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # A step

    @overload  # type: ignore[override]
    def step(self, closure: Closure) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> Tensor | None: ...

    @_disable_dynamo  # a compiled training step must not compile the noise; the model inside still is
    @torch.inference_mode(False)  # buffers made inside it could never be written outside it again
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """Estimate and move. Without a closure: apply what the last `query` estimated.

        Returns:
            The loss to log, a new 0-d float64 tensor on the CPU: the mean over the unbiased probes. None only without a
            closure.

        Raises:
            ClosureError: no closure and no pending query; the closure does not return one number; or the loss has not
                been a finite number for several steps in a row.
            StateError: an earlier step broke off while it moved the weights.
        """
        if closure is not None:
            self.query(closure)
        if self._asked is None:
            if all(float(group["lr"]) == 0.0 for group in self.param_groups):
                self._count_step()  # how torch.distributed.checkpoint makes an optimizer create its state
                return None
            raise ClosureError(
                "ZO needs the loss at several points: call step(closure), or query(closure) and then step()."
            )
        ctx, estimate = self._asked
        self._asked = None
        self._standing.check()
        with self._standing.moving(f"Step {self.step_number}"):
            self.last = settle(self.method, ctx, estimate, self._record, lambda: self._move(estimate))
            self.param_groups[0]["zo_step"] += 1
            if self.folding.is_due(self.step_number):
                self.folding.fold(self.seed, self.step_number)
            self._count_step()
        self._counts["refused"] += not self.last.accepted
        self.patience.count(self.last, self.step_number - 1)
        return torch.tensor(float(estimate.loss), dtype=torch.float64)

    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def query(self, closure: Closure) -> Tensor:
        """Ask for all losses of one step and keep the estimate; the weights do not move before `step()`.

        Returns:
            The loss to log, a 0-d float64 tensor.
        """
        self._standing.check()
        check_hyperparameters(self.param_groups)
        check_folding(self.folding.every, self.method, self.rule, self.param_groups)
        self.folding.check()
        self.weights.check_kinds()
        self.last = None  # its direction may hold factors of all matrices
        ctx = context_of(self, closure)
        estimate = ctx.read(self.method.estimate(ctx))
        self._counts["forwards"] += ctx.queries
        self._asked = (ctx, estimate)
        return torch.tensor(float(estimate.loss), dtype=torch.float64)

    @torch.no_grad()
    def fold(self) -> None:
        """Write pending moves into the module's tensors, which lag until then; does nothing if nothing is pending.

        Steps that are multiples of `fold_every` do it themselves, and so does a step whose factors have nothing in common
        with what is pending. A fold of factors at another step rounds at another step too, so the ledger is told, and a
        replay folds there as well. To look at the weights in between without changing the run, use `folded`.
        """
        self._standing.check()
        if self.ledger is not None and self.folding.pending:
            self.ledger.fold(self.describe, self.step_number)
        moving = self._standing.moving(f"The fold after {self.step_number} steps")
        with (
            moving if self.folding.pending else nullcontext()
        ):  # else there are late moves alone: written, or they wait on
            self.folding.fold(self.seed, self.step_number)
            self._count_step()

    def folded(self) -> AbstractContextManager[None]:
        """The module's tensors are folded inside the block, and have their own bits again after it: for evaluation.

        Takes a copy of the tensors that have something pending; nothing right after a step that folds. No steps inside.
        """
        return self.folding.folded(self.seed, self.step_number)

    @property
    def step_number(self) -> int:
        """Steps taken, refused ones included."""
        return int(self.param_groups[0]["zo_step"])

    @property
    def seed(self) -> int:
        """The run seed."""
        return int(self.param_groups[0]["zo_seed"])

    @property
    def forwards(self) -> int:
        """Queries that the method has asked for, in all."""
        return int(self._counts["forwards"])

    @property
    def refused(self) -> int:
        """Steps whose numbers were not finite, in all."""
        return int(self._counts["refused"])

    @property
    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.param_groups[0]["zo_counts"]
        return counts

    def _move(self, estimate: Estimate) -> None:
        self._counts["updates"] += 1
        move(self, self.rule.prepare(estimate))

    def _record(self, outcome: Outcome) -> None:
        if self.ledger is not None:
            loss, groups = float(outcome.estimate.loss), hyperparameters_of(self.param_groups)
            entry = Entry(self.step_number, loss, list(outcome.losses), groups)
            with self._standing.unmoved():
                self.ledger.append(self.describe, entry, pending=bool(self.folding.pending))

    def _count_step(self) -> None:
        # One cheap entry per parameter: an empty state makes torch.distributed.checkpoint allocate gradients.
        step = torch.tensor(float(self._counts["updates"]))  # one for all: it is never written to
        for slot in self.weights:
            state = self.state[slot.tensor]
            state["step"] = step
            if slot.carried is not None:
                state["carried"] = slot.carried

    # ------------------------------------------------------------------------------------------------------------------
    # Saving

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: tensors, numbers, strings; loads with `weights_only=True`.

        Pending moves are in it. With the module's own state of the same moment it resumes the run bit for bit.
        """
        self._standing.check()
        self.param_groups[0] |= parts_of_state(self)
        state = super().state_dict()
        state["param_groups"][0]["zo_counts"] = dict(self._counts)  # these go on counting
        self._forget_states()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state. Tensors keep their dtype (torch's own loading casts them to the parameter's).

        Raises:
            ConfigError: it is of another method, rule, noise or dtype, of other tensors, or of no ZO.
        """
        refuse_other_kind(self, state_dict)
        refuse_lost_moves(state_dict, self.folding.every)
        super().load_state_dict(state_dict)
        take_up(self, state_dict)
        self._forget_states()
        self._asked = None
        self._standing.restored()

    def _forget_states(self) -> None:
        """The groups only carry them into and out of files; kept there, a learned mean would be held twice."""
        self.param_groups[0] |= NO_STATE

    def __repr__(self) -> str:
        parts = f"{self.method}, {self.rule}, engine={self.engine.name!r}, seed={self.seed}, step={self.step_number}"
        settings = zip(self.param_groups, hyperparameters_of(self.param_groups), strict=True)
        return (
            f"ZO({parts}, " + ", ".join(f"{len(group['params'])} tensors with {one}" for group, one in settings) + ")"
        )

    def describe(self) -> dict[str, Any]:
        """What a ledger's header says: enough to make the same optimizer again."""
        return {**describe(self), "sites": sites_hash(self._named()), "groups": hyperparameters_of(self.param_groups)}

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
