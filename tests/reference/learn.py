"""Learning to learn as its paper's code does it: deep copies, autograd through the scales, plain loops.

Zhang et al. 2026, arXiv 2510.00419. Everything but the last factor sigma is a constant.
"""

import copy

import torch

from tests.reference.zo_finetuner import as_module


class Twin:
    """Networks as torch modules that learn on a model; `loss(model, batch)` is a tensor with a graph."""

    def __init__(self, model, networks, *, lr_llm, momentum, clip, window, lr_mlp, lr_update, eps, batch, seed_noise):
        self.model, self.start = model, copy.deepcopy(model)
        self.nets = {name: as_module(networks, i).double() for i, name in enumerate(networks.names)}
        self.given = (lr_llm, momentum, clip, window, lr_mlp, lr_update, eps)
        self.rows, self.draw = 15 * batch, seed_noise  # draw(step, name, shape)
        self.state, self.step, self.done = {}, 0, 0
        self.begin()

    def begin(self):
        """A window begins: weights of the start, a fresh SGD."""
        self.model.load_state_dict(self.start.state_dict())
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=self.given[1])
        self.done = 0

    def visit(self, task, loss, batch):
        lr_llm, _, clip, window, lr_mlp, lr_update, eps = self.given
        named = dict(self.model.named_parameters())
        before, losses = self.state.get(task, (dict.fromkeys(named, 1.0), (0.0, 0.0)))
        sigma, w = {}, {}
        for name, p in named.items():
            p = p.detach().double()
            x = torch.tensor([float(p.mean()), float(p.var()), *losses, before[name]], dtype=torch.float64)
            sigma[name] = self.nets[name](x.float().double()).abs()[0]
            w[name] = self.rows * p.shape[1] if "embed" in name else p.numel()
        nf = (sum(w.values()) / sum(w[n] * sigma[n].item() ** 2 for n in w)) ** 0.5
        u = {name: self.draw(self.step, name, p.shape) for name, p in named.items()}

        def at(scale, model=None):
            moved = copy.deepcopy(self.model)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p += scale * nf * float(sigma[name]) * u[name]
            return moved

        with torch.no_grad():
            plus, minus = (float(loss(at(sign * eps), batch)) for sign in (1, -1))
        c = (plus - minus) / (2 * eps)
        moved = {n: p.detach() - lr_update * nf * c * sigma[n].to(p.dtype) * u[n] for n, p in named.items()}
        judged = loss(lambda **given: torch.func.functional_call(self.model, moved, (), given), batch)
        parameters = [q for net in self.nets.values() for q in net.parameters()]
        gradients = torch.autograd.grad(judged, parameters)
        with torch.no_grad():
            for q, g in zip(parameters, gradients, strict=True):
                q -= lr_mlp * g
        self.sgd.zero_grad()
        loss(self.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.sgd.param_groups[0]["lr"] = lr_llm * (1 - self.done / window)
        self.sgd.step()
        self.state[task] = ({n: s.item() for n, s in sigma.items()}, (plus, minus))
        self.step, self.done = self.step + 1, self.done + 1
        return (plus + minus) / 2, c, nf
