"""Common random numbers: every query of a step sees the same dropout masks, and nobody's generator is disturbed."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def common_random_numbers(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed torch, numpy and Python for the block; put all global generators back afterwards, also after an exception.

    Args:
        seed: the same number for all queries of a step, another one for the next step.
        devices: CUDA devices whose generators a closure may use. The CPU generator is always included.
    """
    cuda = sorted(
        {d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"}
    )
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = [torch.cuda.get_rng_state(index) for index in cuda]
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
        torch.set_rng_state(cpu_state)
        for index, state in zip(cuda, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, index)
