"""zotune in a plain torch loop: no backward, no gradients, any module.

python examples/plain_torch.py
"""

import torch
from torch import nn

import zotune


def main(steps: int = 2000) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()  # are the first two numbers of the same sign?

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    opt = zotune.ZO(model.named_parameters(), method="mezo", lr=5e-2, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    first = accuracy = (model(x).argmax(1) == y).float().mean().item()
    for step in range(steps):
        batch = torch.randint(len(x), (128,), generator=generator)
        loss = opt.step(lambda batch=batch: nn.functional.cross_entropy(model(x[batch]), y[batch]))
        scheduler.step()
        if step % 500 == 0 or step == steps - 1:
            accuracy = (model(x).argmax(1) == y).float().mean().item()
            print(f"step {step:4}, {opt.forwards} forwards, loss {loss:.3f}, accuracy {accuracy:.3f}")
    return first, accuracy


if __name__ == "__main__":
    main()
