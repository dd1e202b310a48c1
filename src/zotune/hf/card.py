"""The model card of a forward-only run: what was done, in numbers, and how to cite it."""

import re
from pathlib import Path
from typing import Any

from zotune.extras import require

BEGIN, END = "<!-- zotune: begin -->", "<!-- zotune: end -->"
TAGS = ("zeroth-order", "forward-only")


def complete_card(path: Path, record: dict[str, Any]) -> None:
    """Add tags and a section on the training to a model card that transformers, TRL or PEFT wrote.

    Args:
        path: of README.md; nothing happens if it does not exist.
        record: as `ZOMixin.record` returns it.
    """
    if not path.is_file():
        return
    hub = require("huggingface_hub", extra="hf", purpose="write model cards")
    card = hub.ModelCard.load(path, ignore_metadata_errors=True)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS, record["method"]]))
    text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n*", "", card.text, flags=re.DOTALL)
    # transformers writes the first-order optimizer that the arguments still name
    text = re.sub(r"^- optimizer: .*$", f"- optimizer: zotune.ZO, {_how(record)}", text, flags=re.MULTILINE)
    card.text = f"{text.rstrip()}\n\n{BEGIN}\n{section(record)}\n{END}\n"
    card.save(path)


def section(record: dict[str, Any]) -> str:
    """The part of the card that zotune writes."""
    rows = {
        "method": f"{record['method']}{_options(record['method_options'])}, {record['paper']}",
        "rule": f"{record['rule']}{_options(record['rule_options'])}",
        "steps": f"{record['steps']:,}" + (f", {record['refused_steps']} refused" if record["refused_steps"] else ""),
        "weights of step": f"{record['weights_of_step']:,}",
        "forward passes": f"{record['forwards']:,}, each over a batch of {record['batch']:,}{_checks(record)}",
        "tokens": f"{record['tokens']:,} of training data; {record['tokens_forwarded']:,} through the model",
        "eps": f"{record['eps']:g}",
        "lr": f"{record['lr']:g} ({record['lr_source']}), {record['schedule']}",
        "weight decay": f"{record['weight_decay']:g}",
        "trained parameters": f"{record['trained_parameters']:,} ({record['trained']})",
        "noise": f"{record['noise']}, low-order bits: {record['low_precision']}",
        "seeds": f"{record['seed']} (noise), {record['data_seed']} (data)",
        "zotune": record["zotune"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(
        [
            "## Trained with forward passes only",
            "",
            f"This model was fine-tuned without backpropagation, {_how(record)}, by zotune. No gradient was computed.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            _replay(record),
            "### How to cite",
            "",
            f"The method: {record['paper']}.{_links(record['paper'])}",
            "The library: zotune (fine-tuning of language models with forward passes only), version "
            f"{record['zotune']}.",
        ]
    )


def _replay(record: dict[str, Any]) -> str:
    if not record["ledger"]:
        return ""
    return (
        "`ledger.jsonl` holds every loss of the run: with the weights it began from, it rebuilds these weights bit for "
        "bit, without data and without a forward pass (`zotune replay`, or `zotune.replay` for adapters).\n"
    )


def _how(record: dict[str, Any]) -> str:
    return f"method {record['method']}, rule {record['rule']}"


def _checks(record: dict[str, Any]) -> str:
    return f"; {record['check_forwards']} more to look at the model" if record["check_forwards"] else ""


def _options(options: dict[str, Any]) -> str:
    return " (" + ", ".join(f"{key}={value}" for key, value in options.items()) + ")" if options else ""


def _links(paper: str) -> str:
    links = [f"https://arxiv.org/abs/{number}" for number in re.findall(r"\d{4}\.\d{4,5}", paper)]
    return f" {', '.join(links)}." if links else ""
