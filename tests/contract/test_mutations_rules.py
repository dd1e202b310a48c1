"""Faults of rules. The first is that of the released ZO-SGD-Sign."""

from dataclasses import replace

import pytest
import torch
from tests.checks import rules
from tests.support.mutations import sees

from zotune.core import recipe
from zotune.core.direction import Combination
from zotune.optim.optimizer import ZO
from zotune.rules.adam import Adam
from zotune.rules.base import buffer, shrink
from zotune.rules.jaguar import Jaguar
from zotune.rules.momentum_replayed import MomentumReplayed
from zotune.rules.sign import SignSGD

FP32, BF16 = torch.float32, torch.bfloat16


def sign_of_the_scalar(patch):
    """sign(rho) z instead of sign(rho z): a step of fixed length along Gaussian z."""

    class OfScalar:
        def __init__(self, direction):
            terms = direction.terms if isinstance(direction, Combination) else ((1.0, direction),)
            self.direction = Combination(tuple((1.0 if float(c) > 0 else -1.0, z) for c, z in terms))

        def add_to(self, out, site, scale=1.0):
            self.direction.add_to(out, site, scale)

    patch.setattr("zotune.rules.sign.Sign", OfScalar)


def sign_tried_with_another_lr(patch):
    right = SignSGD.trial
    patch.setattr(SignSGD, "trial", lambda self, g, group: right(self, g, {**group, "lr": 1e-9}))


def sign_forgotten_in_the_trial(patch):
    """The estimate is tried as it is, and its sign applied."""
    patch.setattr(SignSGD, "trial", lambda self, g, group: -group["lr"] * g)


def first_chunk_of_the_buffer(patch):
    """The buffer is indexed from 0 in each chunk: all chunks share the first one's momentum."""
    for module in ("momentum", "adam", "adamm", "jaguar"):
        patch.setattr(
            f"zotune.rules.{module}.buffer", lambda state, key, w, site: buffer(state, key, w, replace(site, start=0))
        )


def fused_addition(patch):
    """w + alpha m in one rounding where vectors are full, in two where they are not."""
    right = torch.Tensor.sub_

    def sub_(self, other):
        body = self.numel() // 8 * 8
        exact = (self.double() - other.double() * (1 + 2.0**-26)).to(self.dtype)
        right(self, other)
        if self.is_contiguous():
            self.view(-1)[:body] = exact.view(-1)[:body]
        return self

    patch.setattr(torch.Tensor, "sub_", sub_)


def state_forgotten(*keys):
    """The optimizer's state is loaded without these."""

    def put_in(patch):
        right = ZO.load_state_dict

        def load(self, state):
            right(self, state)
            for of_parameter in self.state.values():
                for key in keys:
                    of_parameter.pop(key, None)

        patch.setattr(ZO, "load_state_dict", load)

    put_in.__name__ = "forgets_" + "_".join(keys)
    return put_in


def adam_counts_from_0_after_a_resume(patch):
    """The step counter is not restored: the bias correction starts again."""
    right = ZO.load_state_dict

    def load(self, state):
        right(self, state)
        self.param_groups[0]["zo_counts"]["updates"] = 0
        for of_parameter in self.state.values():
            of_parameter["step"] = torch.tensor(0.0)

    patch.setattr(ZO, "load_state_dict", load)


def largest_dropped(patch):
    patch.setattr(torch, "maximum", lambda old, new, out: out.copy_(new))


def momentum_not_written_down(patch):
    patch.setattr(MomentumReplayed, "state_dict", lambda self: {"past": []})


def recipe_rounds_to_fp32(patch):
    right = recipe._KINDS["Combination"]
    patch.setitem(
        recipe._KINDS,
        "Combination",
        (
            lambda c: {"terms": [[float(torch.tensor(a).float()), t] for a, t in right[0](c)["terms"]]},
            right[1],
        ),
    )


def window_ages_the_wrong_way(patch):
    right = MomentumReplayed.prepare

    def prepare(self, estimate):
        right(self, estimate)
        total = Combination()
        for age, direction in enumerate(self._past):
            total += self.beta**age * direction
        return replace(estimate, direction=total)

    patch.setattr(MomentumReplayed, "prepare", prepare)


def average_decays_untouched(patch):
    """JAGUAR's accumulator is multiplied by beta on tensors that were not looked at."""
    right = Jaguar.__call__

    def call(self, weight, site, estimate, group, state):
        touching = replace(estimate, direction=estimate.direction + 0.0 * rules.noise())
        right(self, weight, site, touching, group, state)

    patch.setattr(Jaguar, "__call__", call)


def moves_only_what_was_touched(patch):
    right = Jaguar.__call__

    def call(self, weight, site, estimate, group, state):
        if estimate.direction.touches(site):
            right(self, weight, site, estimate, group, state)

    patch.setattr(Jaguar, "__call__", call)


def bias_correction_forgotten(patch):
    right = Adam.__call__

    def call(self, weight, site, estimate, group, state):
        state["step"] = 1e9
        right(self, weight, site, estimate, group, state)

    patch.setattr(Adam, "__call__", call)


def decay_after_the_move(patch):
    """Then the move shrinks too."""

    def move(weight, site, group, step):
        weight.sub_(step * float(group["lr"]))
        shrink(weight, site, group)

    patch.setattr("zotune.rules.momentum.move", move)


def moved_by_lr_0(patch):
    patch.setattr("zotune.rules.momentum.move", lambda w, site, group, step: w.sub_(step * float(group["lr"])))


MUTATIONS = [
    (sign_of_the_scalar, rules.check_sign_moves_every_number_by_lr),
    (sign_of_the_scalar, lambda: rules.check_equals_the_readable_twin("sign")),
    (sign_tried_with_another_lr, lambda: rules.check_the_trial_is_the_update("sign")),
    (sign_forgotten_in_the_trial, lambda: rules.check_the_trial_is_the_update("sign")),
    (first_chunk_of_the_buffer, lambda: rules.check_chunks_do_not_matter("momentum")),
    (first_chunk_of_the_buffer, lambda: rules.check_chunks_do_not_matter("adam", BF16)),
    (fused_addition, lambda: rules.check_chunks_do_not_matter("momentum")),
    (state_forgotten("momentum"), lambda: rules.check_resumes("momentum")),
    (state_forgotten("square"), lambda: rules.check_resumes("adam")),
    (state_forgotten("largest"), lambda: rules.check_resumes("adamm", rule_options={"beta2": 0.1})),
    (state_forgotten("average"), lambda: rules.check_resumes("jaguar")),
    (adam_counts_from_0_after_a_resume, lambda: rules.check_resumes("adam", dtype=BF16)),
    (bias_correction_forgotten, rules.check_adam_is_torch_adam),
    (largest_dropped, rules.check_adamm_never_forgets_a_large_estimate),
    (largest_dropped, lambda: rules.check_equals_the_readable_twin("adamm", beta2=0.9)),
    (momentum_not_written_down, lambda: rules.check_resumes("momentum_replayed")),
    (recipe_rounds_to_fp32, lambda: rules.check_replayed_momentum_is_momentum(3, 0.5)),
    (window_ages_the_wrong_way, lambda: rules.check_replayed_momentum_is_momentum(3, 0.5)),
    (average_decays_untouched, rules.check_jaguar_keeps_what_was_not_touched),
    (moves_only_what_was_touched, rules.check_jaguar_keeps_what_was_not_touched),
    (decay_after_the_move, lambda: rules.check_equals_the_readable_twin("momentum", weight_decay=0.3)),
    (moved_by_lr_0, lambda: rules.check_lr_0_changes_no_bit("momentum", FP32)),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
