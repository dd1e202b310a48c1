"""ZO Fine-tuner: MeZO with a learned noise scale for every tensor.

Zhang, Li, Zhao, Sun, Zhang, "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", ICML 2026, arXiv 2510.00419. A
small network per tensor, trained beforehand on another task, reads the tensor and the last losses and gives a scale:

    sigma_i = | net_i(mean(theta_i), var(theta_i), l+, l-, sigma_i of the step before) |      first step: l+- = 0, sigma = 1
    nf = sqrt( sum_i w_i / sum_i w_i sigma_i^2 )        w_i = numel_i; 15 B hidden for embeddings
    v_i = nf sigma_i u_i,  u ~ N(0, I)
    l+- = L(theta +- eps v);  rho = (l+ - l-) / (2 eps);  g = rho v

Forwards per step: 2. Extra memory: 449 numbers per tensor (its network) and the last sigma.

E[g_i] = (nf sigma_i)^2 grad_i: a preconditioner that is one number per tensor. Equal sigmas are MeZO, exactly. nf keeps
the size of the step (sum_i w_i (nf sigma_i)^2 = sum_i w_i), so only ratios of the sigmas matter.

Chosen where paper and code leave room: moments are of the current full-precision weights, in fp64; the variance of a
single number is 0 (torch's is not a number); losses and sigmas of refused steps are not remembered; sigmas and losses go
into checkpoints. Networks are evaluated in fp32; the released code does it in the model's dtype (`dtype`). It also splits
the factor of rho into 1/20 and 10 lr, which is the same step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate
from zotune.core.direction import Direction, Scaled
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.finetuner.folder import load_folder
from zotune.finetuner.names import MISSING, assign, shuffled
from zotune.finetuner.networks import NUMBERS, Networks, untrained
from zotune.finetuner.profile import PART, counted, moments_of, rms
from zotune.methods.base import Base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class ZOFineTuner(Base):
    """Central differences along noise whose scale on each tensor a small network gives."""

    finetuner: str | None = None  # folder that `zotune import-finetuner` made
    networks: str = "folder"  # "untrained" and "constant" are controls: random networks; equal scales, which is MeZO
    init_seed: int = 0  # of untrained networks
    shuffle: int | None = None  # control: a seed that deals the networks out at random among the tensors
    missing: str = "error"  # tensors without a network; "rms": the root mean square of the others, MeZO's scale
    normalise: bool = True  # False: nf = 1
    batch: int = 16  # B: examples per batch, for the embedding's weight in nf; 16 in the released code's runs
    world_size: int = 1  # processes with a batch each
    dtype: str = "fp32"  # in which networks are evaluated; the released code: the model's
    digest: str | None = None  # of the folder's networks: filled in, and checked where it is given (as by a ledger)

    name: ClassVar[str] = "zo_finetuner"
    paper: ClassVar[str] = "Zhang et al. 2026, arXiv 2510.00419"
    extra_state: ClassVar[str] = f"{NUMBERS + 1} numbers per tensor (its network, its last scale)"

    def __post_init__(self) -> None:
        """Check the options and load the networks."""
        self.check("networks", self.networks in _NETWORKS, f"one of {', '.join(_NETWORKS)}")
        self.check("missing", self.missing in MISSING, f"one of {', '.join(MISSING)}")
        self.check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self.check("batch", self.batch >= 1, "at least 1 example")
        self.check("world_size", self.world_size >= 1, "at least 1 process")
        controls = "It belongs to networks='folder'."
        self.check("finetuner", self.finetuner is None or self.networks == "folder", "left out", controls)
        self.check("digest", self.digest is None or self.finetuner is not None, "left out", controls)
        self.check("shuffle", self.shuffle is None or self.networks != "constant", "left out", "All scales are equal.")
        self._loaded = None if self.finetuner is None else self._load(self.finetuner)
        self._index: list[int | None] = []  # the network of each tensor
        self._names: list[str] = []  # the tensors, in the order of _index and _sigma
        self._sigma = torch.empty(0)  # (n,) fp32 of the last accepted step
        self._losses = [0.0, 0.0]  # l+ and l- of the last accepted step
        self._asked: Tensor | None = None  # sigmas of the step that is under way

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """The networks, and one sigma per tensor."""
        if self.networks == "constant":
            return 0
        held = len(sites) * NUMBERS * 4 if self._loaded is None else self._loaded.nbytes
        return held + 4 * len(sites)

    def estimate(self, ctx: Context) -> Estimate:
        """rho * v, with v = nf sigma_i u on tensor i."""
        v, info = self._direction(ctx)
        eps = ctx.eps
        plus, minus = ctx.loss([+eps * v, -eps * v])
        rho = (plus - minus) / (2 * eps)
        return Estimate(rho * v, (plus + minus) / 2, {"rho": rho, **info})

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Every tensor must find its network."""
        if self.networks != "constant":
            self._bind(sites)

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """Remember what the networks read in the next step: the sigmas without nf, and the losses in the order +, -."""
        if self._asked is not None:
            self._sigma, self._losses, self._asked = self._asked, ctx.losses[:2], None

    def state_dict(self) -> dict[str, Any]:
        """The last sigmas and losses."""
        return {"names": list(self._names), "sigma": self._sigma.clone(), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up sigmas and losses; networks are found again by name."""
        self._names, self._index, self._asked = list(state["names"]), [], None
        self._sigma, self._losses = state["sigma"].detach().clone().cpu(), [float(loss) for loss in state["losses"]]

    def use(self, networks: Networks) -> None:
        """Take these networks instead of a folder's, as learning does after each change of them."""
        self._loaded = networks

    def factors(self, ctx: Context) -> tuple[dict[str, float], float]:
        """nf sigma_i of each tensor, from the current weights and the last accepted step; and nf."""
        self._bind(ctx.sites)
        sigma = self._sigmas(ctx)
        counts = [counted(site, self.batch * self.world_size) for site in ctx.sites]
        size = rms(sigma, counts)
        if not (math.isfinite(size) and size > 0.0):
            raise ConfigError(_no_scale(ctx.sites, sigma, counts))
        nf = 1.0 / size if self.normalise else 1.0
        self._asked = torch.tensor(sigma, dtype=torch.float32)
        return {site.name: nf * s for site, s in zip(ctx.sites, sigma, strict=True)}, nf

    def features(self, ctx: Context) -> Tensor:
        """(k, 5) fp32: what the networks of the k tensors that have one are asked with, in the order of the tensors."""
        before = self._sigma.tolist()
        asked = [
            [*moments_of(map(ctx.weight, _parts(ctx.sites[i]))), *self._losses, before[i]]
            for i, number in enumerate(self._index)
            if number is not None
        ]
        return torch.tensor(asked, dtype=torch.float64).float()

    # ------------------------------------------------------------------------------------------------------------------

    def _direction(self, ctx: Context) -> tuple[Direction, dict[str, float]]:
        """v, and nf for the log."""
        if self.networks == "constant":
            return ctx.gaussian(), {}
        factors, nf = self.factors(ctx)
        return Scaled(ctx.gaussian(), factors), {"nf": nf}

    def _sigmas(self, ctx: Context) -> list[float]:
        """sigma of each tensor: what its network answers, or the root mean square of the others."""
        assert self._loaded is not None
        known = [(i, number) for i, number in enumerate(self._index) if number is not None]
        answers = self._loaded.sigma(self.features(ctx), [number for _, number in known], DTYPES[self.dtype]).tolist()
        sigma = dict(zip((i for i, _ in known), answers, strict=True))
        counts = [counted(ctx.sites[i], self.batch * self.world_size) for i in sigma]
        return [sigma.get(i, rms(answers, counts)) for i in range(len(ctx.sites))]

    def _bind(self, sites: Sequence[Site]) -> None:
        """Find each tensor's network and last sigma, once."""
        names = [site.name for site in sites]
        if self._index and names == self._names:
            return
        if self._names and set(names) != set(self._names):
            raise ConfigError(
                f"The state of {self.name!r} is of {len(self._names)} other tensors than those trained here."
            )
        if self._loaded is None:
            self._loaded = _NETWORKS[self.networks](self, names)
        found = assign(self._loaded.names, names, self.missing)
        self._index = found if self.shuffle is None else shuffled(found, names, self.shuffle)
        before = dict(zip(self._names, self._sigma.tolist(), strict=True))
        self._names, self._sigma = names, torch.tensor([before.get(name, 1.0) for name in names])

    def _load(self, folder: str) -> Networks:
        """The folder's networks, if they are those of the digest."""
        networks, _ = load_folder(folder)
        found = networks.digest()
        if self.digest not in (None, found):
            raise ConfigError(
                f"The networks in {folder} hash to {found}, but the run used those of {self.digest}: the folder was made "
                "anew or replaced. Give the fine-tuner of the run, or leave digest out to begin another run."
            )
        object.__setattr__(self, "digest", found)  # filled in while it is made; options are fixed
        return networks


def _parts(site: Site) -> Iterator[Site]:
    """A whole site in parts that are read one after the other, so that no copy of it is made."""
    return (site.part(start, min(PART, site.count - start)) for start in range(0, site.count, PART))


def _nothing(method: ZOFineTuner, names: list[str]) -> Networks:
    raise ConfigError(
        "Method 'zo_finetuner' needs trained networks: give finetuner=FOLDER (`zotune import-finetuner FILE --out FOLDER` "
        "makes one from a released file). Without any there are the controls networks='untrained' and 'constant' (MeZO)."
    )


# how networks are found that no folder gave
_NETWORKS: dict[str, Callable[[ZOFineTuner, list[str]], Networks]] = {
    "folder": _nothing,
    "untrained": lambda method, names: untrained(names, method.init_seed),
    "constant": _nothing,  # never asked
}


def _no_scale(sites: Sequence[Site], sigma: Sequence[float], counts: Sequence[int]) -> str:
    broken = [site.name for site, s in zip(sites, sigma, strict=True) if not math.isfinite(s)]
    if broken:
        return (
            f"The networks answered with numbers that are not finite, first for {broken[0]!r}: its weights or the last "
            "losses are too large. Lower lr or eps."
        )
    if not sum(counts):
        return "Method 'zo_finetuner' trains vectors and matrices; there are none among the trained tensors."
    return "Every network answers 0, so there would be no noise at all: these networks cannot be used."
