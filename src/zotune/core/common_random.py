"""Common random numbers: every query of a step sees the same dropout masks, and nobody's generator is disturbed."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_state(devices: Iterable[torch.device]) -> list[torch.Tensor]:
    """The states of torch's generators: the CPU's, then those of CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in _cuda(devices))]


def put_back(states: list[torch.Tensor], devices: Iterable[torch.device]) -> None:
    """Undo what was drawn since `random_state` gave these."""
    torch.set_rng_state(states[0])
    for index, state in zip(_cuda(devices), states[1:], strict=True):
        torch.cuda.set_rng_state(state, index)


def _cuda(devices: Iterable[torch.device]) -> list[int]:
    return sorted(
        {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
    )


@contextmanager
def common_random_numbers(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed torch, numpy and Python for the block; put all global generators back afterwards, also after an exception.

    Args:
        seed: the same number for all queries of a step, another one for the next step.
        devices: CUDA devices whose generators a closure may use. The CPU generator is always included.
    """
    devices = list(devices)
    cuda, before = _cuda(devices), random_state(devices)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        put_back(before, devices)
