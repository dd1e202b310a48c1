"""The one step: the same few lines for every method, rule and engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Direction
from zotune.core.site import Site

# Runs a forward pass and returns one number, a 0-d tensor or a float; a (B,) tensor for methods that need "examples".
Closure = Callable[[], Any]


@runtime_checkable
class Method(Protocol):
    """One paper: how a gradient is estimated from losses. `methods.base.Base` has the parts that most methods share."""

    name: ClassVar[str]
    paper: ClassVar[str]
    extra_state: ClassVar[str]  # what is kept beside the weights, in words

    @property
    def needs(self) -> frozenset[str]:
        """What engine and rule must offer.

        "slope": forward-mode derivatives. "examples": a loss for each example. "trial": a rule that can be tried.
        """
        ...

    @property
    def low_rank(self) -> bool:
        """Whether its directions are low-rank on matrices: then moves can wait as factors (`ZO(fold_every=...)`)."""
        ...

    @property
    def has_recipe(self) -> bool:
        """Whether its estimates can be written down as a few numbers: no tensors in their directions."""
        ...

    @property
    def forwards(self) -> float:
        """Queries per step, on average."""
        ...

    def forwards_for(self, sites: Sequence[Site]) -> float:
        """Queries per step when these sites are trained, for methods where it depends on them."""
        ...

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """Bytes kept between steps when these sites are trained."""
        ...

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise a ConfigError if these sites cannot be trained: asked by runs, before anything is evaluated or written."""
        ...

    def estimate(self, ctx: Context) -> Estimate:
        """The gradient estimate of one step."""
        ...

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """Learn from the losses, after they are known and before the weights move. Not called for refused steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps: tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        ...


class Rule(Protocol):
    """How an estimate moves one tensor."""

    name: ClassVar[str]
    extra_state: ClassVar[str]
    # "trial": `trial` says where it would move, from the estimate alone, and trial(-g) is -trial(g).
    # "linear": that is a multiple of the estimate, so that moves may be added up and written later.
    offers: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]]  # "recipe": estimates that can be written down as a few numbers

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """Bytes kept between steps when these sites are trained."""
        ...

    def prepare(self, estimate: Estimate) -> Estimate:
        """Called once per accepted step, before any tensor moves: the estimate that is to be applied."""
        ...

    def trial(self, direction: Direction, group: dict[str, Any]) -> Direction:
        """Where the rule would move the weights, as a displacement. Only if "trial" is offered."""
        ...

    def displacements(
        self, sites: Sequence[Site], estimate: Estimate, group: dict[str, Any]
    ) -> Sequence[Direction | None]:
        """For each site what a call would add to its values, if adding a direction is all that it does there; else None.

        The rule is not called for a site that it names a direction for: that is added in one pass over the weights.
        """
        ...

    def __call__(
        self, weight: Tensor, site: Any, estimate: Estimate, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Change full-precision values of (a part of) one site in place.

        Args:
            weight: fp32 or fp64 values of the part.
            site: which part of which tensor.
            estimate: the gradient estimate, as `prepare` returned it.
            group: the parameter group: lr, weight_decay after schedulers.
            state: what the rule remembers about the whole tensor; `state["step"]` counts its updates so far.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers beside the per-tensor states."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        ...


class Engine(Protocol):
    """How queries are answered; owns the promise that the stored weights are not disturbed.

    An engine that offers "slope" also has `slope(direction, closure, seed) -> (loss, derivative along the direction)`; one
    that offers "examples" has `example_losses(points, closure, seed)`: (len(points), B) float64, of closures that return
    one loss per example, at points that may differ from example to example.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[str]]
    extra_memory: ClassVar[str]  # beside a forward pass
    reason: str  # why this engine works the way it does on this model
    check_forwards: int  # forwards spent on looking at the model, beside those that methods ask for

    def losses(self, points: Sequence[Direction], closure: Closure, seed: int) -> Tensor:
        """The loss at each point, float64; `seed` fixes the common random numbers."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    estimate: Estimate
    losses: list[float]
    accepted: bool


def settle(
    method: Method, ctx: Context, estimate: Estimate, record: Callable[[Outcome], None], move: Callable[[], None]
) -> Outcome:
    """The second half of a step: write down what was learned, then let it move the weights.

    Numbers that are not finite never reach the weights: such a step is recorded, counted and otherwise left out. Here, if
    not before, the numbers of a step on a GPU are read on the host: the ledger's line is written before the weights move.
    """
    estimate = ctx.read(estimate)
    outcome = Outcome(estimate, ctx.losses, accepted=estimate.is_finite())
    record(outcome)
    if outcome.accepted:
        method.observe(ctx, estimate)
        move()
    return outcome
