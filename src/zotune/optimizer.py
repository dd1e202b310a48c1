"""ZO: a method, a rule and an engine put together as a `torch.optim.Optimizer`."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim uses it: does not import dynamo

from zotune.core.context import AskExamples, Context, Estimate
from zotune.core.direction import Direction
from zotune.core.ledger import Entry, Ledger, sites_hash
from zotune.core.noise import check_kind, stream
from zotune.core.site import Site
from zotune.core.step import Closure, Engine, Method, Outcome, Rule, settle
from zotune.core.weights import Change, Slot, Weights
from zotune.engines import make_engine
from zotune.errors import ClosureError, ConfigError
from zotune.folding import Folding
from zotune.methods import make_method
from zotune.parameters import (
    HYPERPARAMETERS,
    check_folding,
    check_hyperparameters,
    default_eps,
    eps_factors,
    hyperparameters_of,
    named_groups,
    trial_of,
    warn_small_eps,
)
from zotune.rules import make_rule
from zotune.saving import describe, refuse_lost_moves, take_up_tensors

PATIENCE = 10  # steps in a row whose numbers are not finite before the run is stopped


class ZO(torch.optim.Optimizer):
    """Zeroth-order optimizer: forward passes only, no gradients, no extra copy of the model.

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
        weight_decay: as in SGD, not applied to biases and norms.
        seed: fixes all noise.
        rule: how an estimate moves the weights: a name (see `zotune.rules.RULES`) or a rule object.
        engine: "auto", "layerwise" or "in_place".
        noise: "normal" (table; the same bits everywhere), "gaussian" (exact) or "rademacher".
        low_precision: how fp16 and bf16 tensors take small updates: "carry" keeps 16 more bits a parameter.
        method_options: options of a method given by name.
        rule_options: options of a rule given by name.
        ledger: a `Ledger` or a path: writes down every loss, so that the run can be replayed.
        fold_every: write moves into the weights every so many steps (50, say; rule "sgd"). Those of low-rank methods add
            up as factors beside the matrices; a dense move is written by the next step's query as it reads the tensor,
            the same bits in fewer passes. BETWEEN TWO FOLDS THE MODULE'S OWN TENSORS LAG BEHIND: call `fold()` before
            anything else reads or writes them, or look inside `folded()`. 0: in each step.

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
    ) -> None:
        groups = named_groups(params)
        self.method: Method = make_method(method, method_options)
        self.rule: Rule = make_rule(rule, rule_options)
        self.noise = check_kind(noise)
        tensors = [tensor for group in groups for _, tensor in group["params"]]
        eps = default_eps(tensors) if eps is None else eps
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "zo_step": 0,
            "zo_seed": int(seed),
            "zo_method": {},
            "zo_rule": {},
            "zo_pending": [],
            "zo_counts": {"updates": 0, "forwards": 0, "refused": 0},
        }
        super().__init__(groups, defaults)
        check_hyperparameters(self.param_groups)
        check_folding(fold_every, self.method, self.rule, self.param_groups)
        warn_small_eps(tensors, self.param_groups[0]["eps"])
        self.weights = Weights(self._named(), low_precision)
        self.folding = Folding(self.weights, fold_every, self.method.low_rank)
        self.engine: Engine = make_engine(engine, self.weights, self.method, self.rule)
        self.ledger = Ledger(ledger) if isinstance(ledger, str | Path) else ledger
        self.last: Outcome | None = None
        self._refused_in_a_row = 0
        self._asked: tuple[Context, Estimate] | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # A step

    @_disable_dynamo  # a compiled training step must not compile the noise; the model inside still is
    @torch.inference_mode(False)  # buffers made inside it could never be written outside it again
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Estimate and move. Without a closure: apply what the last `query` estimated.

        Returns:
            The loss to log, a 0-d float64 tensor: the mean over the unbiased probes.

        Raises:
            ClosureError: no closure and no pending query; the closure does not return one number; or the loss has not
                been a finite number for several steps in a row.
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
        self.last = settle(self.method, ctx, estimate, self._record, lambda: self._move(estimate))
        self.param_groups[0]["zo_step"] += 1
        if self.folding.is_due(self.step_number):
            self.folding.fold(self.seed, self.step_number)
        self._count_step()
        self._count_refusals(self.last)
        return torch.tensor(float(estimate.loss), dtype=torch.float64)

    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def query(self, closure: Closure) -> Tensor:
        """Ask for all losses of one step and keep the estimate; the weights do not move before `step()`.

        Returns:
            The loss to log, a 0-d float64 tensor.
        """
        check_hyperparameters(self.param_groups)
        check_folding(self.folding.every, self.method, self.rule, self.param_groups)
        self.folding.check()
        self.last = None  # its direction may hold factors of all matrices
        step, seed = self.step_number, self.seed
        queries, sites = _seed_of(seed, step), [slot.site for slot in self.weights]
        ctx = Context(
            step=step,
            seed=seed,
            hyperparameters={key: float(self.param_groups[0][key]) for key in HYPERPARAMETERS},
            sites=sites,
            ask=lambda points: self.engine.losses(self.folding.displaced(points, sites), closure, queries),
            weight=self.folding.weight,
            kind=self.noise,
            factors=eps_factors(self.param_groups),
            slope=self._slope(closure, queries),
            trial=partial(trial_of, self.method, self.rule, self.param_groups)
            if "trial" in self.method.needs
            else None,
            ask_examples=self._ask_examples(closure, queries),
        )
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
        if self.ledger is not None and self.folding.pending:
            self.ledger.fold(self.describe, self.step_number)
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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks an optimizer before it steps: the first moment to see that there is one."""
        raise ConfigError(
            "A gradient scaler (fp16 mixed precision) has nothing to scale: ZO makes no gradients, and the scaler would stop "
            "with 'No inf checks were recorded'. Step without it: bf16 autocast, or weights in fp16, need none."
        )

    def _slope(self, closure: Closure, seed: int) -> Callable[[Direction], tuple[float, float]] | None:
        slope = getattr(self.engine, "slope", None)
        return None if slope is None else lambda direction: slope(direction, closure, seed)

    def _ask_examples(self, closure: Closure, seed: int) -> AskExamples | None:
        ask = getattr(self.engine, "example_losses", None)
        return None if ask is None else lambda points: ask(points, closure, seed)

    def _move(self, estimate: Estimate) -> None:
        estimate = self.rule.prepare(estimate)
        self._counts["updates"] += 1
        later: set[str] = set()
        if self.folding.every and self.folding.low_rank:
            where = self.seed, self.step_number
            later = self.folding.take(estimate.direction, self.rule.trial, self.param_groups, *where)
        self.weights.low_precision.begin(self.seed, self.step_number)
        moves: list[tuple[Slot, Change, Direction | None]] = []
        for group in self.param_groups:
            slots = [self.weights.by_tensor[id(parameter)] for parameter in group["params"]]
            slots = [slot for slot in slots if slot.site.name not in later]
            sites = [slot.site for slot in slots]
            along = self.rule.displacements(sites, estimate, group)
            changes = [partial(self._change, estimate, group, self.state[slot.tensor]) for slot in slots]
            moves.extend(zip(slots, changes, along, strict=True))
        self.weights.update_all(moves, self.folding.late)

    def _change(
        self, estimate: Estimate, group: dict[str, Any], state: dict[str, Any], values: Tensor, part: Site
    ) -> None:
        self.rule(values, part, estimate, group, state)

    def _record(self, outcome: Outcome) -> None:
        if self.ledger is not None:
            loss, groups = float(outcome.estimate.loss), hyperparameters_of(self.param_groups)
            entry = Entry(self.step_number, loss, list(outcome.losses), groups)
            self.ledger.append(self.describe, entry, pending=bool(self.folding.pending))

    def _count_refusals(self, outcome: Outcome) -> None:
        self._counts["refused"] += not outcome.accepted
        self._refused_in_a_row = 0 if outcome.accepted else self._refused_in_a_row + 1
        if self._refused_in_a_row >= PATIENCE:
            raise ClosureError(
                f"The loss has not been a finite number for {PATIENCE} steps in a row (last: {outcome.losses}); those steps "
                "left the weights alone. Lower lr or eps, or run the forward pass in bf16 or fp32 instead of fp16."
            )
        if not outcome.accepted:
            warnings.warn(f"Step {self.step_number - 1} was refused: its losses are {outcome.losses}.", stacklevel=4)

    def forgive(self) -> None:
        """Forget the refused steps in a row: the next PATIENCE of them are taken again before the run is stopped."""
        self._refused_in_a_row = 0

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
        self.param_groups[0]["zo_method"] = self.method.state_dict()
        self.param_groups[0]["zo_rule"] = self.rule.state_dict()
        self.param_groups[0]["zo_pending"] = self.folding.state_dict()
        state = super().state_dict()
        state["param_groups"][0]["zo_counts"] = dict(self._counts)  # these go on counting
        self._forget_states()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state. Tensors keep their dtype (torch's own loading casts them to the parameter's)."""
        refuse_lost_moves(state_dict, self.folding.every)
        super().load_state_dict(state_dict)
        take_up_tensors(self, state_dict)
        self.method.load_state_dict(self.param_groups[0]["zo_method"])
        self.rule.load_state_dict(self.param_groups[0]["zo_rule"])
        self.folding.load_state_dict(self.param_groups[0].get("zo_pending", []))
        self._forget_states()
        self._asked = None

    def _forget_states(self) -> None:
        """The groups only carry them into and out of files; kept there, a learned mean would be held twice."""
        self.param_groups[0] |= {"zo_method": {}, "zo_rule": {}, "zo_pending": []}

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError(
            "ZO cannot be copied or pickled as a whole: its noise and its state hang on the tensors that it was made with. "
            "Copy the model, make a ZO for the copy, and load state_dict() into it."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at construction: sites, noise and ledger are fixed then."""
        if hasattr(self, "weights"):
            raise ConfigError("ZO's tensors are fixed when it is made: give all groups to the constructor.")
        super().add_param_group(param_group)

    def describe(self) -> dict[str, Any]:
        """What a ledger's header says: enough to make the same optimizer again."""
        return {**describe(self), "sites": sites_hash(self._named()), "groups": hyperparameters_of(self.param_groups)}

    def _named(self) -> list[tuple[str, Tensor]]:
        return [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]


def _seed_of(seed: int, step: int) -> int:
    """The seed of the common random numbers of a step, 63 bits."""
    high, low = stream(seed, "queries", step).key
    return (high << 31) ^ low
