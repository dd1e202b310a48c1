"""Does a model heed the masks and positions of `packed` layouts? Tried once, on a few tokens."""

from typing import Any

import torch

from zotune.tasks.encoding import Encoded
from zotune.tasks.head import wide
from zotune.tasks.layout import lay_out
from zotune.tasks.logits import BodyAndHead, LogitSource
from zotune.tasks.module_modes import eval_mode
from zotune.tasks.packed import pack

LIMITS = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
"""Settings of a model's configuration that bound a row in which every token sees all that its mask says."""
TRIAL = (  # the first fills a row, the others share one; each token is seen by some and not by others
    Encoded([0, 1, 2, 3], ([0, 2, 0], [0, 3, 1, 1], [2, 1, 3]), 0),
    Encoded([2, 0, 1], ([1, 1, 3], [3, 2]), 0),
    Encoded([1, 3], ([2, 0], [0, 1]), 0),
)
NEIGHBOURS = (  # trees of the same shape, with other tokens where those of UNMOVED do not look
    Encoded([0, 1, 2, 3], ([0, 1, 0], [0, 3, 2, 1], [2, 1, 3]), 0),
    Encoded([3, 1, 2], ([2, 2, 3], [3, 2]), 0),
    TRIAL[2],
)
UNMOVED = [0, 1, 3, 5, 6, -3, -2, -1]
"""Queries of the trial that have the same tokens before them in both."""


def longest_packed(source: LogitSource, device: torch.device) -> tuple[int, str]:
    """Try whether this model heeds masks and positions, so that `packed` layouts may be used.

    Returns:
        the longest row in which it may be relied upon (0: none), and the reason.
    """
    if not isinstance(source, BodyAndHead):
        return 0, "a row for each option: the body cannot be called apart"
    refused = "a row for each option: "
    config: Any = getattr(source.body, "config", None)
    bounds = [getattr(config, name, None) for name in LIMITS]
    length = min((int(bound) for bound in bounds if bound), default=1 << 30)
    try:
        with torch.no_grad(), eval_mode(source.body):  # dropout would draw other masks in another layout
            states, other = (wide(source.hidden(pack(batch, 0), device)) for batch in (TRIAL, NEIGHBOURS))
            rows = wide(source.hidden(lay_out(TRIAL, 0), device))
    except Exception as error:  # models that take no such mask fail in ways of their own
        return 0, f"{refused}the model takes no mask of who sees whom ({type(error).__name__})"
    same = torch.equal(states[UNMOVED], other[UNMOVED])  # of one shape, and zeros where masked: not a bit may differ
    if not same:
        return 0, f"{refused}the model does not heed a mask of who sees whom"
    # rounding, which depth adds up (3e-6 in SmolLM2 in fp32), against wrong positions (a tenth and more, in some query)
    allowed = max(2.0**-10, 16 * torch.finfo(source.autocast or next(source.body.parameters()).dtype).eps)
    if (states - rows).norm(dim=1).gt(allowed * rows.norm(dim=1)).any():
        return 0, f"{refused}positions or masks given to the model lead to other hidden states"
    return length, "each prompt is fed once for all options, and short examples share rows, where that saves an eighth"
