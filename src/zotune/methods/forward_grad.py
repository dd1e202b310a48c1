"""Forward gradient: the exact slope along a random direction, by one dual forward pass and no eps.

Baydin, Pearlmutter, Syme, Wood, Torr, "Gradients without Backpropagation", 2022, arXiv 2202.08587. For fine-tuning language
models: Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark" (ZO-Bench), ICML
2024, arXiv 2402.11592.

    z_i ~ N(0, I)
    rho_i = grad L(theta) . z_i          by forward-mode differentiation: the limit of a difference for eps -> 0
    g = (1/n) sum_i rho_i z_i

Forwards per step: n, each of them dual (values and tangents together) at the time of three to four plain ones: every matrix
product becomes three. Extra memory between steps: none; during a query the tangents of one module's weights and of the
activations that are alive.

E[g] = grad L exactly, for any loss and n; E|g|^2 = (d + n + 1)/n |grad L|^2 for Gaussian z, as for MeZO. What is gained is
no eps, hence no bias and no cancellation; what is lost is that the closure must be differentiable and fused kernels cannot
be used. The released ZO-Bench code stores z for all parameters, knows n = 1 only, and keeps tangents of everything that the
model returns; here z is a recipe, and only the loss is kept.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination
from zotune.methods.sources import FromSource


@dataclass(eq=False)
class ForwardGrad(FromSource):
    """Average of n exact slopes along random directions times those directions."""

    n: int = 1  # directions per step
    source: str = "gaussian"  # where directions come from
    source_options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "forward_grad"
    paper: ClassVar[str] = "Baydin et al. 2022, arXiv 2202.08587"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("n", self.n >= 1, "at least 1 direction per step")
        self.take_source()

    @property
    def needs(self) -> frozenset[str]:
        """Slopes."""
        return frozenset({"slope"})

    @property
    def forwards(self) -> float:
        """Queries per step, each of them a dual forward pass."""
        return self.n

    def estimate(self, ctx: Context) -> Estimate:
        """The mean of n slopes times their directions."""
        g, loss, rho = Combination(), 0.0, 0.0
        for _ in range(self.n):
            z = self._source.draw(ctx)
            here, rho = ctx.slope(z)
            g += (rho / self.n) * z
            loss += here / self.n
        return Estimate(g, loss, {"rho": rho})
