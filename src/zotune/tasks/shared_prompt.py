"""A prompt that is read once for all options of an example: its keys and values are kept and each option goes on from them.

With many options of several tokens (ReCoRD: about 25 after 230 tokens) nearly all the work is the prompt. For evaluation:
examples go one by one, which pays where the prompts saved are long.
"""

import copy

import torch
from torch import Tensor

from zotune.tasks.encoding import Encoded
from zotune.tasks.head import wide
from zotune.tasks.layout import Layout, count_rows
from zotune.tasks.scoring import OptionScorer, mean_per_option

WORTHWHILE = 256
"""Tokens that must be saved for an example to go by itself."""
TRIAL = Encoded([0, 1, 2], ([3, 1], [2, 0, 1], [3, 2], [1]), 0)


def worthwhile(example: Encoded) -> bool:
    """Whether reading the prompt once saves enough."""
    return (count_rows(example) - 1) * len(example.prompt_ids) >= WORTHWHILE


class SharedPrompt:
    """Scores as ``OptionScorer.scores``, of one example at a time.

    Attributes:
        works: whether the model goes on from kept keys and values as from the text itself, tried once on a few tokens.
        reason: why it does not.
    """

    def __init__(self, scorer: OptionScorer) -> None:
        self.scorer = scorer
        self.works, self.reason = self._try()

    @torch.no_grad()
    def scores(self, example: Encoded, most_rows: int) -> Tensor:
        """Return the scores (1, K) of the example's options, fed in parts of at most ``most_rows`` rows."""
        source, device = self.scorer.source, self.scorer.device
        layout = self.scorer.lay_out([example])
        length = len(example.prompt_ids)
        here = torch.zeros(1, dtype=torch.int64, device=device)
        prompt = layout.input_ids[:1, :length].to(device)
        logits, cache = source.read_on(prompt, None, here, here + length - 1)
        found = torch.zeros(len(layout.token_id), dtype=wide(logits).dtype)  # (T,)
        _note(found, layout, torch.zeros(1, dtype=torch.int64), logits)  # the first query is the prompt's end
        for start in range(0, len(layout.input_ids) if layout.input_ids.shape[1] > length else 0, most_rows):
            tails = layout.input_ids[start : start + most_rows, length:].to(device)
            row, position = layout.query_row - start, layout.query_position - length
            asked = ((row >= 0) & (row < len(tails)) & (position >= 0)).nonzero().squeeze(1)
            kept = copy.deepcopy(cache)
            kept.batch_repeat_interleave(len(tails))
            logits, _ = source.read_on(tails, kept, row[asked].to(device), position[asked].to(device))
            _note(found, layout, asked, logits)
        return mean_per_option(found, layout)

    def _try(self) -> tuple[bool, str]:
        with torch.no_grad():
            plain = self.scorer.scores([TRIAL])
        try:
            shared = self.scores(TRIAL, 2)
        except Exception as error:  # wrappers and models without such a cache fail in ways of their own
            return False, f"the prompt is read again for each option: {type(error).__name__}: {error}"
        lowest = self.scorer.autocast or next(self.scorer.model.parameters()).dtype
        # as in ``logits``: a few units of the dtype; log-probabilities of -10 come from logits of about that size
        if (plain - shared).abs().max() > 16 * torch.finfo(lowest).eps * max(1.0, float(plain.abs().max())):
            return (
                False,
                "the prompt is read again for each option: going on from kept keys and values gives other scores",
            )
        return True, "the prompt is read once for all options"


def _note(found: Tensor, layout: Layout, asked: Tensor, logits: Tensor) -> None:
    """Put the log-probabilities of the tokens that these queries predict into ``found`` (T,)."""
    place = torch.full((len(layout.query_row),), -1)
    place[asked] = torch.arange(len(asked))
    tokens = (place[layout.token_query] >= 0).nonzero().squeeze(1)
    query, token = place[layout.token_query[tokens]].to(logits.device), layout.token_id[tokens].to(logits.device)
    logits = wide(logits)
    found[tokens] = (logits[query, token] - logits.logsumexp(-1)[query]).to(found.device)
