"""zotune in an accelerate loop: prepare as always, no `accelerator.backward`, no `zero_grad`.

python examples/accelerate_loop.py
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/accelerate_loop.py   # each process has batches of its own
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zotune


def main(steps: int = 1200, micro_batches: int = 2) -> tuple[float, float]:
    accelerator = Accelerator()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 8, generator=generator)
    y = (x[:, 0] > x[:, 1]).long()  # is the first number larger than the second?
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True, generator=generator)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    zo = zotune.ZO(model.named_parameters(), method="mezo", lr=2e-2, eps=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(zo, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, zo, loader, schedule)

    def loss_of(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        # All micro-batches belong into one closure: `accelerator.accumulate` would drop all but the last one.
        loss = torch.stack([nn.functional.cross_entropy(model(inputs), labels) for inputs, labels in batches]).mean()
        return accelerator.reduce(loss, reduction="mean")  # all processes must hear the same loss

    first, batches = share_of_right_answers(model, x, y, accelerator.device), endless(loader)
    for step in range(steps):
        batch = [next(batches) for _ in range(micro_batches)]
        optimizer.step(lambda batch=batch: loss_of(batch))  # the wrapper returns nothing: the loss is in zo.last
        schedule.step()
        if step % 300 == 299:
            accelerator.print(f"step {step + 1:4}, {zo.forwards} forwards, loss {float(zo.last.estimate.loss):.3f}")

    with tempfile.TemporaryDirectory() as folder:  # weights, optimizer, scheduler, samplers: resumes to the same bits
        accelerator.save_state(folder)
    last = share_of_right_answers(model, x, y, accelerator.device)
    accelerator.print(f"right answers: {first:.3f} before, {last:.3f} after")
    return first, last


def endless(loader: DataLoader):
    while True:
        yield from loader


@torch.no_grad()
def share_of_right_answers(model: nn.Module, x: torch.Tensor, y: torch.Tensor, device: torch.device) -> float:
    return (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()


if __name__ == "__main__":
    main()
