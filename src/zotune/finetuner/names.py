"""Which network belongs to which tensor: by name, and nothing in silence."""

import warnings
from collections.abc import Sequence

from zotune.core.noise import stream, uniform
from zotune.errors import ConfigError

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
MISSING = ("error", "rms")
_SHOWN = 5  # names listed in a message


def assign(known: Sequence[str], wanted: Sequence[str], missing: str = "error") -> list[int | None]:
    """The network's number for each wanted tensor; None where there is none and `missing` is "rms".

    Tensors that an adapter (LoRA) is wrapped around are found under the name they have without it. A head of its own,
    where the networks were made for tied embeddings, gets the network of the embedding. Networks that no tensor wants are
    left out. A warning says either of these two.

    Args:
        known: canonical names that have a network.
        wanted: canonical names of the trained tensors.
        missing: "error" or "rms".

    Raises:
        ConfigError: a tensor has no network and `missing` is "error"; or none has one.
    """
    numbers = {name: number for number, name in enumerate(known)}
    found = [numbers.get(name, numbers.get(without_adapter(name))) for name in wanted]
    embeddings = [number for name, number in numbers.items() if name.endswith(EMBEDDING)]
    if HEAD in wanted and HEAD not in numbers and len(embeddings) == 1:
        found[list(wanted).index(HEAD)] = embeddings[0]
        warnings.warn(
            f"The fine-tuner was made for tied embeddings, this model's are not: {HEAD} uses the network of "
            f"{known[embeddings[0]]}.",
            stacklevel=2,
        )
    _refuse_gaps(known, wanted, found, missing)
    plain = {without_adapter(name) for name in wanted}.union(wanted)
    unused = [name for name in known if name not in plain]
    if unused:
        reason = "it is tied to the embedding, or not trained" if unused == [HEAD] else "no such tensor is trained"
        warnings.warn(f"Networks left out ({reason}): {listed(unused)}.", stacklevel=2)
    return found


def without_adapter(name: str) -> str:
    """The name that a tensor has where no adapter is wrapped around its module.

    >>> without_adapter("model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return name.replace(".base_layer.", ".")


def _refuse_gaps(known: Sequence[str], wanted: Sequence[str], found: Sequence[int | None], missing: str) -> None:
    gaps = [name for name, number in zip(wanted, found, strict=True) if number is None]
    if not gaps or (missing == "rms" and len(gaps) < len(wanted)):
        return
    ways = (
        "networks='untrained' needs none."
        if len(gaps) == len(wanted)
        else "missing='rms' gives the tensors without a network the root mean square of the others, that is MeZO's scale."
    )
    raise ConfigError(
        f"The fine-tuner has no network for {len(gaps)} of {len(wanted)} trained tensors: {listed(gaps)}. Its networks are "
        f"for {listed(known)}. Networks go with exact tensor names: a fine-tuner serves models of the architecture and "
        f"depth that it was trained on, with all their weights; adapters (LoRA, prefixes) have other names. {ways}"
    )


def shuffled(found: Sequence[int | None], names: Sequence[str], seed: int) -> list[int | None]:
    """The same networks dealt out at random among the tensors that have one; the order of the tensors is not seen."""
    numbers = {name: number for name, number in zip(names, found, strict=True) if number is not None}
    cards = sorted(numbers, key=lambda name: uniform(stream(seed, "shuffled networks", name), 0.0, 1.0))
    dealt = {name: numbers[card] for name, card in zip(sorted(numbers), cards, strict=True)}
    return [dealt.get(name) for name in names]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
