"""Log-probabilities of chosen tokens without the matrix of logits.

The normaliser of a prediction is a sum over the vocabulary, so the output matrix is multiplied a few thousand rows at a
time, and each piece of logits is summed up while it lies in the cache: 720 predictions of SmolLM2 (49,152 tokens) cost
what the matrix product costs, where softmax of the full matrix in fp32 costs as much again, and 140 MB.

An engine that perturbs weights can do the same: it hands over products with perturbed rows, piece by piece, so that a
perturbed vocabulary-sized matrix never exists (`engines.forms`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor, int, int], Tensor]
"""States (Q, d), first and last row of the output matrix -> their products (Q, last - first), without the bias."""
Asked = tuple[Tensor, Tensor, Tensor]
"""Hidden states (Q, d) in the matrix's dtype; (T,) int64, the state that predicts each token; (T,) int64, the token."""

PIECE = 1 << 22  # elements of the matrix that are multiplied at once
TILES = {"cpu": 1 << 18}  # logits that are summed up at once: a megabyte of fp32 stays in a second-level cache
ANY_TILE = 1 << 26  # on other devices few large launches are better


class TokenLogProbability(nn.Module):
    """The output layer up to the log-probability of given tokens; shares the Parameters of an `nn.Linear`.

    It is a module of its own, and is called as one, because engines perturb weights when a module is called.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("bias", head.bias)

    def forward(self, asked: Asked) -> Tensor:
        """Return log-probabilities (T,) in fp32 or better."""
        return self.in_pieces(lambda states, first, last: F.linear(states, self.weight[first:last]), asked)

    def in_pieces(self, product: Product, asked: Asked) -> Tensor:
        """The same with someone else's products; the pieces are the same, so equal products give equal bits."""
        states, query, token = asked
        vocabulary, width = self.weight.shape
        step = max(256, PIECE // width // 256 * 256)
        sums: list[Tensor] = []  # log of the sum of exponentials of each piece, (Q,)
        found: Tensor | None = None  # logits of the tokens, (T,)
        for first in range(0, vocabulary, step):
            last = min(first + step, vocabulary)
            piece = product(states, first, last)
            if self.bias is not None:
                piece = piece + self.bias[first:last]
            rows = max(1, TILES.get(piece.device.type, ANY_TILE) // (last - first))
            sums.append(torch.cat([wide(tile).logsumexp(-1) for tile in torch.split(piece, rows)]))
            # no choice of tokens by condition here: on a GPU that would wait for the numbers
            here = wide(piece[query, (token - first).clamp(0, last - first - 1)])
            found = here if found is None else torch.where(token >= first, here, found)
        assert found is not None
        return found - torch.stack(sums, 1).logsumexp(1)[query]


def wide(tensor: Tensor) -> Tensor:
    """At least fp32: what follows takes differences of large numbers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
