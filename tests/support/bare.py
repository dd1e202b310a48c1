"""A method without an engine: a `Context` whose losses are those of a plain function of fp64 tensors.

For Monte-Carlo claims about an estimate: thousands of steps a second.
"""

import torch

from zotune.core.context import Context, as_losses
from zotune.core.site import Site


def sites_of(weights):
    """Sites of a dict of name -> tensor."""
    return [Site(name, tuple(tensor.shape)) for name, tensor in weights.items()]


def realised(direction, weights):
    """A direction as a dict of name -> fp64 tensor."""
    return {site.name: direction.realise(site, torch.float64) for site in sites_of(weights)}


def flat(tensors):
    """A dict of tensors as one vector, in the dict's order."""
    return torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors.values()])


def displaced(weights, point):
    """The weights plus a point, as new tensors."""
    moved = {name: tensor.detach().clone().to(torch.float64) for name, tensor in weights.items()}
    for site in sites_of(weights):
        point.add_to(moved[site.name], site)
    return moved


def bare_context(weights, loss, *, step=0, seed=0, eps=1e-3, kind="normal", asked=None, trial=None, **hyperparameters):
    """A step's context. `weights`: dict of name -> tensor; `loss`: dict -> number; `asked`: a list that collects points."""

    def ask(points):
        if asked is not None:
            asked.extend(points)
        return as_losses([float(loss(displaced(weights, point))) for point in points])

    return Context(
        step=step,
        seed=seed,
        hyperparameters={"eps": eps, **hyperparameters},
        sites=sites_of(weights),
        ask=ask,
        weight=lambda site: weights[site.name].detach().clone(),
        kind=kind,
        trial=trial,
    )


def estimate_of(method, weights, loss, **settings):
    """(estimated gradient as one vector, the estimate, the context) of one step; `observe` is called too."""
    ctx = bare_context(weights, loss, **settings)
    estimate = method.estimate(ctx)
    method.observe(ctx, estimate)
    return flat(realised(estimate.direction, weights)), estimate, ctx
