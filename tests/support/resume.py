"""A run that is saved, loaded and continued ends with the bits of one that was never interrupted."""

import torch


def check_resumes(path, begin, stop, steps):
    """`begin()` gives (named tensors, loss of a dict of them, optimizer), the same each time."""
    named, loss, opt = begin()
    _advance(named, loss, opt, stop)
    torch.save({"opt": opt.state_dict(), "weights": {name: p.detach().clone() for name, p in named}}, path)
    _advance(named, loss, opt, steps - stop)
    kept = torch.load(path, weights_only=True)
    again, loss, resumed = begin()
    for name, p in again:
        p.data.copy_(kept["weights"][name])
    resumed.load_state_dict(kept["opt"])
    _advance(again, loss, resumed, steps - stop)
    assert resumed.forwards == opt.forwards
    for (name, p), (_, q) in zip(named, again, strict=True):
        assert torch.equal(p, q), f"{name} differs after resuming at step {stop}"


def _advance(named, loss, opt, steps):
    for _ in range(steps):
        opt.step(lambda: loss(dict(named)))
