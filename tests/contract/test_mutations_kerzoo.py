"""Faults of KerZOO put in on purpose; the radius per tensor and the constant of K5 are those of its code and its paper."""

from fractions import Fraction
from functools import partial

import pytest
from tests.checks import kerzoo as checks
from tests.support.mutations import sees

from zotune.core.direction import Scaled
from zotune.methods import kerzoo
from zotune.methods.kerzoo import KerZOO


def kernel_dropped(patch):
    """A random radius without its weight: the sign of r then flips half of the estimates."""
    patch.setattr(KerZOO, "kernel_at", lambda self, r: 1.0)


def kernel_replaced(patch):
    """K1 for K3: still E[r K] = 1, but the eps^2 term stays."""
    patch.setattr(KerZOO, "kernel_at", lambda self, r: 3 * r)


def radius_per_tensor(patch):
    def per_tensor(self, ctx, z, i):
        r = {site.name: ctx.uniform(-1.0, 1.0) for site in ctx.sites}
        return ctx.eps, Scaled(z, r), Scaled(z, {name: self.kernel_at(v) for name, v in r.items()}), 1.0

    patch.setitem(kerzoo.VARIANTS, "theory", per_tensor)


def printed_constant(patch):
    """195/64 in K5."""
    right = kerzoo.kernel
    patch.setattr(kerzoo, "kernel", lambda *law: tuple(c * Fraction(195, 105) for c in right(*law)))


def kernel_of_another_law(patch):
    """Radii kept from 0 while the kernel stays Legendre's: the low-precision guard as it is usually put in."""
    right = kerzoo.kernel
    patch.setattr(kerzoo, "kernel", lambda order, low=0.0: right(order))


def radius_not_in_the_probe(patch):
    right = kerzoo.VARIANTS["theory"]

    def probe(self, ctx, z, i):
        h, _, weighted, r = right(self, ctx, z, i)
        return h, z, weighted, r

    patch.setitem(kerzoo.VARIANTS, "theory", probe)


def kernel_kept_on_a_shrunk_interval(patch):
    """What the released code does: K of [-1, 1] for radii of [-a, a]."""

    def kept(self, ctx, z, i):
        r = self.radius * ctx.uniform(-1.0, 1.0)
        return ctx.eps, r * z, self.kernel_at(r) * z, r

    patch.setitem(kerzoo.VARIANTS, "theory", kept)


def interval_that_does_not_shrink(patch):
    patch.setattr(kerzoo, "LEAST", 1.0)


def one_radius_in_the_released_variant(patch):
    right = KerZOO.tensor_radius
    patch.setattr(KerZOO, "tensor_radius", lambda self, ctx, i, site, a: right(self, ctx, i, ctx.sites[0], a))


FAULTS = [
    (kernel_dropped, checks.check_linear_step),
    (kernel_dropped, checks.check_equals_the_readable_twin),
    (kernel_replaced, checks.check_shared_radius_is_unbiased_on_a_cubic),
    (radius_per_tensor, checks.check_linear_step),
    (radius_per_tensor, checks.check_equals_the_readable_twin),
    (printed_constant, partial(checks.check_conditions, 5)),
    (printed_constant, partial(checks.check_linear_step, 3, 5)),
    (kernel_of_another_law, partial(checks.check_conditions, 3, 0.25)),
    (radius_not_in_the_probe, checks.check_linear_step),
    (kernel_kept_on_a_shrunk_interval, checks.check_interval_is_a_scale_of_eps),
    (interval_that_does_not_shrink, checks.check_released_equals_the_readable_twin),
    (one_radius_in_the_released_variant, checks.check_released_equals_the_readable_twin),
]


@pytest.mark.parametrize(("put_in", "check"), FAULTS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
