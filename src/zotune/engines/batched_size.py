"""How many copies share a forward: decided by size alone, so that every run and every resumed run decides alike.

Measured on SmolLM2-135M, two threads: a dense pair in one forward saves 1 to 12 % of a step with 512 and 1,024 tokens, more
with fewer; at 2,000 tokens 2 % and nothing (bf16, fp32), and the copies' activations would count. Low-rank points, which write
no weights, are never slower together; several directions gain while a forward is small.
"""

DENSE_TOKENS = 1024  # of one copy: above this, points on dense directions are asked one at a time
TOGETHER = 512  # tokens of all copies, where there are more than two of them: bounds activations
ANY = 1 << 14  # the same, for those who ask for the batched engine by name


def copies_for(tokens: int, waiting: int, low_rank: bool, by_size: bool) -> int:
    """The number of points that the next forward answers: at least 1, at most `waiting`; both sides of a pair together.

    Args:
        tokens: of one copy (rows of its matrix products).
        waiting: points of the wave that have no answer yet.
        low_rank: whether all matrices move in low-rank directions, which are evaluated on activations.
        by_size: False if the batched engine was asked for by name: then whatever is bounded will do.
    """
    if by_size and tokens > DENSE_TOKENS and not low_rank:
        return 1
    many = (TOGETHER if by_size else ANY) // max(1, tokens)
    return min(waiting, max(2, many - many % 2))
