"""Conservative: try the step and its opposite before taking one, or stay.

ZO-SGD-Cons of Zhang, Li, Hong, Li, Zhang, Zheng et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
Fine-Tuning: A Benchmark", ICML 2024, arXiv 2402.11592 (after the stochastic three-points method of Bergou, Gorbunov,
Richtarik, SIAM J. Optim. 2020):

    z ~ N(0, I)
    rho = [ L(theta + eps z) - L(theta - eps z) ] / (2 eps),   g = rho z
    theta <- argmin of L over { theta, theta - lr g, theta + lr g }        all on the same batch

Forwards per step: 5. Extra memory: none. Works with rules that can be tried: "sgd", and "sign" with sign(g) for g.

With an equal loss the weights stay, and candidates whose loss is not finite never win, so the loss on the batch cannot
increase. The losses of candidates choose the step but are not logged (a minimum over candidates is biased): the logged
loss is L(theta). In the released code the candidates go through AdamW by default, for which adding -2g does not undo +g,
and losses that are not numbers choose theta + lr g.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE
from zotune.methods.base import Base


@dataclass(frozen=True)
class Conservative(Base):
    """The best of staying, the step, and its opposite."""

    name: ClassVar[str] = "conservative"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2402.11592"

    @property
    def needs(self) -> frozenset[str]:
        """A rule whose step is known before it is taken."""
        return frozenset({"trial"})

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 5

    def estimate(self, ctx: Context) -> Estimate:
        """g, -g or nothing: whichever has the smallest loss after the rule's step."""
        eps, z = ctx.eps, ctx.gaussian()
        here, plus, minus = ctx.loss([HERE, +eps * z, -eps * z])
        rho = (plus - minus) / (2 * eps)
        g = rho * z
        if not math.isfinite(float(here) + float(rho)):
            return Estimate(g, here)  # nothing can be compared; the step is refused
        down, up = ctx.loss([ctx.trial(g), ctx.trial(-g)])
        best, choice = float(here), 0
        for loss, sign in ((float(down), 1), (float(up), -1)):
            if math.isfinite(loss) and loss < best:
                best, choice = loss, sign
        return Estimate({0: HERE, 1: g, -1: -g}[choice], here, {"rho": float(rho), "choice": float(choice)})
