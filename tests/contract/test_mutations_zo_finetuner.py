"""Faults of the ZO Fine-tuner put in on purpose: each must turn a check red. See `test_mutations`."""

from dataclasses import replace

import pytest
import torch
from tests.checks import zo_finetuner as checks
from tests.support.mutations import sees

from zotune.core.direction import Scaled
from zotune.finetuner import profile
from zotune.finetuner.networks import Networks
from zotune.methods import zo_finetuner as module
from zotune.methods.zo_finetuner import ZOFineTuner


def columns(order):
    """The networks read their features in another order."""

    def put_in(patch):
        right = Networks.sigma
        patch.setattr(Networks, "sigma", lambda self, x, index, *rest: right(self, x[:, order], index, *rest))

    return put_in


def feeds_back_with_nf(patch):
    right = ZOFineTuner.factors

    def factors(self, ctx):
        made, nf = right(self, ctx)
        self._asked = nf * self._asked
        return made, nf

    patch.setattr(ZOFineTuner, "factors", factors)


def embedding_counts_in_full(patch):
    patch.setattr(module, "counted", lambda site, examples: site.numel)


def batch_of_training(patch):
    """B of the run that trained the networks, whatever this run's is."""
    patch.setattr(module, "counted", lambda site, examples: profile.counted(site, 8))


def one_process(patch):
    right = profile.counted
    patch.setattr(module, "counted", lambda site, examples: right(site, 2))


def biased_variance(patch):
    def moments_of(parts):
        parts = list(parts)
        mean, variance = profile.moments_of(parts)
        n = sum(part.numel() for part in parts)
        return mean, variance * (n - 1) / n

    patch.setattr(module, "moments_of", moments_of)


def deviation_for_variance(patch):
    def moments_of(parts):
        values = torch.cat([part.reshape(-1) for part in parts])
        return float(values.mean()), float(values.std())

    patch.setattr(module, "moments_of", moments_of)


def perturbed_weights(patch):
    """Scales are taken once more after the first probe, of weights that stand there."""

    def estimate(self, ctx):
        v, info = self._direction(ctx)
        eps, here = ctx.eps, ctx.weight
        (plus,) = ctx.loss([+eps * v])

        def displaced(site):
            moved = here(site)
            (+eps * v).add_to(moved, site)
            return moved

        ctx.weight = displaced
        second = Scaled(v.inner, self.factors(ctx)[0])
        (minus,) = ctx.loss([-eps * second])
        return module.Estimate((plus - minus) / (2 * eps) * second, (plus + minus) / 2, {"rho": 0.0, **info})

    patch.setattr(ZOFineTuner, "estimate", estimate)


def learns_from_refused_steps(patch):
    """State is written where the estimate is made, as in a trainer that keeps no such steps apart."""
    right = ZOFineTuner.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        self.observe(ctx, made)
        return made

    patch.setattr(ZOFineTuner, "estimate", estimate)


def one_network_per_shape(patch):
    """Tensors of equal shape share a network, as when networks are looked up by what they look like."""
    right = ZOFineTuner._bind

    def bind(self, sites):
        right(self, sites)
        first = {}
        self._index = [first.setdefault(site.shape, n) for site, n in zip(sites, self._index, strict=True)]

    patch.setattr(ZOFineTuner, "_bind", bind)


def networks_by_position(patch):
    """Names are ignored: the i-th tensor gets the i-th network."""
    patch.setattr(module, "assign", lambda known, names, missing: list(range(len(names))))


def sigma_is_a_variance(patch):
    """The network's answer taken for a variance, as the paper's words have it: its root multiplies the noise."""
    right = Networks.sigma
    patch.setattr(Networks, "sigma", lambda self, *what: right(self, *what).sqrt())


def mean_instead_of_root_mean_square(patch):
    patch.setattr(
        module, "rms", lambda sigma, counts: sum(s * c for s, c in zip(sigma, counts, strict=True)) / sum(counts)
    )


def probes_scaled_update_not(patch):
    """v in the probes, u in the update: E[g] = nf sigma grad instead of its square."""
    right = ZOFineTuner.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        ((rho, v),) = made.direction.terms
        return replace(made, direction=rho * v.inner)

    patch.setattr(ZOFineTuner, "estimate", estimate)


def starts_with_zero(patch):
    right = ZOFineTuner._bind

    def bind(self, sites):
        fresh = not self._names
        right(self, sites)
        if fresh:
            self._sigma = torch.zeros_like(self._sigma)

    patch.setattr(ZOFineTuner, "_bind", bind)


def equal_scales():
    checks.check_equal_scales_are_mezo(0.25)


FAULTS = [
    (columns([0, 1, 3, 2, 4]), checks.check_features_in_order),  # losses swapped
    (columns([0, 1, 3, 2, 4]), checks.check_equals_the_readable_twin),
    (columns([1, 0, 2, 3, 4]), checks.check_features_in_order),
    (feeds_back_with_nf, checks.check_remembers_sigma_without_nf),
    (feeds_back_with_nf, checks.check_equals_the_readable_twin),
    (embedding_counts_in_full, checks.check_normaliser),
    (embedding_counts_in_full, checks.check_equals_the_readable_twin),
    (batch_of_training, checks.check_normaliser),
    (one_process, checks.check_normaliser),
    (biased_variance, checks.check_features_in_order),
    (biased_variance, checks.check_first_features),
    (deviation_for_variance, checks.check_features_in_order),
    (perturbed_weights, checks.check_weights_asked_at),
    (learns_from_refused_steps, checks.check_refused_steps_are_forgotten),
    (one_network_per_shape, checks.check_networks_belong_to_names),
    (networks_by_position, checks.check_networks_belong_to_names),
    (sigma_is_a_variance, checks.check_features_in_order),
    (mean_instead_of_root_mean_square, checks.check_normaliser),
    (probes_scaled_update_not, lambda: checks.check_mean_of_estimates(count=200)),
    (probes_scaled_update_not, checks.check_equals_the_readable_twin),
    (starts_with_zero, checks.check_first_features),
    (mean_instead_of_root_mean_square, checks.check_equals_the_readable_twin),
    (lambda patch: patch.setattr(module, "rms", lambda sigma, counts: 1.0), equal_scales),  # no normaliser at all
]


@pytest.mark.parametrize(("put_in", "check"), FAULTS)
def test_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
