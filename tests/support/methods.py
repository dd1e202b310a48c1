"""Every method with options under which a tiny model shows what it does: refreshes within a few steps, ranks that fit.

`VARIANTS` has at least one row for each registered method; a test counts them.
"""

import warnings
from dataclasses import dataclass, field

from zotune.methods import make_method
from zotune.optimizer import ZO


@dataclass(frozen=True)
class Variant:
    """A method with options, and a rule it is used with."""

    method: str
    options: dict = field(default_factory=dict)
    rule: str = "sgd"
    lr: float = 1e-3
    period: int = 1  # steps over which the queries per step average to `forwards`
    reads_weights: bool = False  # its directions depend on the weights' values, so on the parametrisation
    elementwise: bool = True  # a permutation of equal parts changes nothing but their noise

    @property
    def id(self):
        return ",".join(
            [self.method, *(f"{k}={v}" for k, v in self.options.items()), *([self.rule] * (self.rule != "sgd"))]
        )

    def method_object(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pool=2 and the like warn, rightly
            return make_method(self.method, dict(self.options))

    def optimizer(self, case, engine="in_place", **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ZO(
                case.named, self.method, engine=engine, method_options=dict(self.options), rule=self.rule,
                **{"lr": self.lr, "eps": 2.0**-7, "seed": 5, **settings},
            )  # fmt: skip


VARIANTS = [
    Variant("mezo"),
    Variant("mezo", {"n": 3}),
    Variant("mezo", {"sides": 1}),
]
