"""Every method with options under which a tiny model shows what it does: refreshes within a few steps, ranks that fit.

`VARIANTS` has at least one row for each registered method; a test counts them.
"""

import warnings
from dataclasses import dataclass, field

import torch

from zotune.methods import make_method
from zotune.optim.optimizer import ZO
from zotune.rules import RULES

PER_EXAMPLE = {"grzo"}  # whose closures return a loss for each example


class OfExamples(ZO):
    """Makes the losses of three examples out of a closure's one."""

    def query(self, closure):
        def of_examples():
            loss = torch.as_tensor(closure(), dtype=torch.float64)
            return torch.stack([loss, loss / 2, loss / 4])

        return super().query(of_examples)


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

    @property
    def can_wait(self):
        """Whether `fold_every` is for it."""
        return "linear" in RULES[self.rule].offers and "slope" not in self.method_object().needs

    def method_object(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pool=2 and the like warn, rightly
            return make_method(self.method, dict(self.options))

    def optimizer(self, case, engine="in_place", **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (OfExamples if self.method in PER_EXAMPLE else ZO)(
                case.named, self.method, engine=engine, method_options=dict(self.options), rule=self.rule,
                **{"lr": self.lr, "eps": 2.0**-7, "seed": 5, **settings},
            )  # fmt: skip


SUBSPACE = {"rank": 2, "interval": 3}
VARIANTS = [
    Variant("mezo"),
    Variant("mezo", {"n": 3}),
    Variant("mezo", {"sides": 1}),
    *(Variant("mezo", rule=rule) for rule in RULES if rule != "sgd"),
    Variant("kerzoo"),
    Variant("kerzoo", {"n": 2, "order": 5, "source": "subzero", "source_options": SUBSPACE}),
    Variant("kerzoo", {"variant": "released"}),
    Variant("kerzoo", rule="momentum"),
    Variant("kerzoo", rule="adam"),
    Variant("kerzoo", rule="sign", lr=1e-5),
    Variant("subzero", SUBSPACE),
    Variant("subzero", {**SUBSPACE, "reshape": "always", "sides": 1}),
    Variant("lozo", {"rank": 2, "interval": 3}),
    Variant("lozo", {"rank": 2, "interval": 3, "momentum": 0.9}),
    Variant("pgap", {"rank": 2, "h": 2, "k": 3, "horizon": 10}, period=3),
    Variant("pgap", {"rank": 2, "h": 2, "k": 3, "delta_start": 1.0, "delta_end": 1.0, "xi": "shared"}, period=3),
    Variant("pgap", {"rank": 3, "h": 2, "k": 3, "horizon": 10, "cap": True, "basis": "random"}, period=3),
    Variant("pgap", {"rank": 2, "h": 2, "k": 3, "horizon": 10}, rule="momentum", period=3),
    Variant("pgap", {"rank": 2, "h": 2, "k": 3, "horizon": 10}, rule="adam", period=3),
    Variant("pgap", {"rank": 2, "h": 2, "k": 3, "horizon": 10}, rule="sign", lr=1e-5, period=3),
    Variant("pizo"),
    Variant("pizo", {"variant": "greedy"}),
    Variant("pizo", {"source": "subzero", "source_options": SUBSPACE}),
    Variant("pizo", rule="momentum"),
    Variant("pizo", rule="adam"),
    Variant("pizo", rule="sign", lr=1e-5),
    Variant("ldsd", {"lr_mu": 0.01}),
    Variant("ldsd", {"lr_mu": 0.01, "mean": "bf16", "ratio": 0.3, "decay": 0.1, "normalise": True}),
    Variant("ldsd", {"lr_mu": 0.01, "mean": "int8"}),
    Variant("ldsd", {"lr_mu": 0.01}, rule="momentum"),
    Variant("ldsd", {"lr_mu": 0.01}, rule="adamm"),
    Variant("ldsd", {"lr_mu": 0.01, "ratio": 0.3}, rule="jaguar", lr=1e-5),
    Variant("jaguar"),
    Variant("jaguar", rule="jaguar", lr=1e-5),
    Variant("zo_finetuner", {"networks": "untrained"}, reads_weights=True),
    Variant("zo_finetuner", {"networks": "constant"}),
    Variant("zo_finetuner", {"networks": "untrained"}, rule="adam", reads_weights=True),
    Variant("adaptive_scales", {"explore": 2}, period=2),
    Variant("adaptive_scales", {"explore": 1, "level": "layer"}),
    Variant("conservative"),
    Variant("conservative", rule="sign", lr=1e-3),
    Variant("sparse", {"interval": 3}),
    Variant("sparse", {"interval": 3, "kind": "magnitude", "n": 2}, reads_weights=True),
    Variant("blockwise"),
    Variant("blockwise", {"update": "each", "level": "tensor"}),
    Variant("fzoo", lr=1e-5),
    Variant("grzo", lr=1e-5),
    Variant("grzo", {"normalise": False}, rule="momentum", lr=1e-4),
    Variant("forward_grad"),
    Variant("es"),
    Variant("es", {"source": "rademacher"}, rule="momentum"),
]
