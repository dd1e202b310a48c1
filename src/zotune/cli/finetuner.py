"""`zotune import-finetuner`: a released file of the ZO Fine-tuner becomes a folder, and is looked at."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zotune.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from zotune.finetuner.fingerprint import Fingerprint
    from zotune.finetuner.networks import Networks

_FURTHEST = 8  # networks listed one by one


def import_finetuner(
    file: Annotated[Path, typer.Argument(help="A released .pth file.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    model: Annotated[str | None, typer.Option(help="Check that every tensor of this model has a network.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was trained on, to be noted.")] = None,
    eps: Annotated[float, typer.Option(help="eps that it was trained with, to be noted.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Batch size that it was trained with, to be noted.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed whose CUDA initialisation is looked for.")] = 42,
    initial: Annotated[
        bool, typer.Option("--initial", help="Control: write the untrained networks that the file began with.")
    ] = False,
) -> None:
    """Turn a released ZO Fine-tuner into a folder, without running its pickle; say how much of it was learned."""
    from zotune.cli.console import console
    from zotune.finetuner.fingerprint import fingerprint
    from zotune.finetuner.folder import save_folder
    from zotune.finetuner.importer import read_released
    from zotune.finetuner.profile import TOKENS

    networks, origin = read_released(file)
    found = fingerprint(networks, seed)
    checked = None if model is None else _check_names(model, networks)
    notes = {"base_model": base_model, "eps": eps, "batch": batch, "world_size": 1, "tokens_per_example": TOKENS}
    written = _initial(networks, found) if initial else networks
    save_folder(out, written, {**origin, **notes, "networks": "initial" if initial else "trained"})
    console.print(_facts(networks, origin, found, checked, out, initial))
    console.print(_furthest(networks, found) if found is not None else _scales(networks))


def _check_names(name: str, networks: "Networks") -> str:
    """Every tensor has its network, and beside a tied head no network is left over."""
    from zotune.core.site import canonical_name
    from zotune.finetuner.names import HEAD, assign, listed
    from zotune.models import load_model

    model, _ = load_model(name)
    wanted = [canonical_name(key) for key, _ in model.named_parameters()]
    assign(networks.names, wanted)
    spare = [key for key in networks.names if key not in wanted and key != HEAD]
    if spare:
        raise ConfigError(
            f"{name} is not the architecture and depth of this fine-tuner, which has networks for {len(spare)} tensors "
            f"that {name} does not have: {listed(spare)}."
        )
    return f"every tensor of {name} has one"


def _initial(networks: "Networks", found: "Fingerprint | None") -> "Networks":
    from zotune.finetuner.fingerprint import cuda_networks
    from zotune.finetuner.networks import from_flat

    if found is None:
        raise ConfigError(
            "--initial needs to know what the networks began with, and that was not found. networks='untrained' gives "
            "random networks of the same kind."
        )
    return from_flat(networks.names, cuda_networks(found.number, found.seed, networks.w1.dtype))


def _facts(
    networks: "Networks",
    origin: dict[str, Any],
    found: "Fingerprint | None",
    checked: str | None,
    out: Path,
    initial: bool,
) -> "Table":
    from zotune.cli.console import facts_table
    from zotune.finetuner.networks import NUMBERS

    count = len(networks.names)
    rows = {
        "file": f"{origin['source']}, sha256 {origin['source_sha256'][:16]}, {origin['source_dtype']}",
        "networks": f"{count}, {count * NUMBERS:,} numbers; from {networks.names[0]} to {networks.names[-1]}",
        "names": checked or "not checked: give --model",
        "began with": _beginning(found, count),
    }
    if found is not None:
        rows["learned"] = _learned(found)
        rows["never changed"] = f"{found.identical} of {count} networks, bit for bit"
    rows["written"] = f"{out}{' (the untrained control)' if initial else ''}"
    return facts_table(rows)


def _beginning(found: "Fingerprint | None", count: int) -> str:
    if found is None:
        return "unknown: not CUDA's numbers of this seed. Below, their scale beside that of a default initialisation"
    runs = zip(found.runs, (*found.runs[1:], count), strict=True)
    spans = ", ".join(f"{first}-{last - 1}" for first, last in runs)
    return f"CUDA's numbers of seed {found.seed}, counted anew at networks {spans} (one GPU each)"


def _learned(found: "Fingerprint") -> str:
    median, high, most = (float(found.distance.double().quantile(q)) for q in (0.5, 0.95, 1.0))
    return (
        f"largest change of a network's numbers: median {median:.1e}, 95th percentile {high:.1e}, most {most:.1e} "
        "(drawn from +-0.447 and +-0.125)"
    )


def _furthest(networks: "Networks", found: "Fingerprint") -> "Table":
    from zotune.finetuner.networks import NUMBERS

    order = found.distance.argsort(descending=True)[:_FURTHEST].tolist()
    rows = [
        (networks.names[i], f"{float(found.distance[i]):.1e}", f"{int(found.changed[i])} of {NUMBERS}") for i in order
    ]
    return _table(("furthest from where they began", "largest change", "numbers changed"), rows)


def _scales(networks: "Networks") -> "Table":
    from zotune.finetuner.fingerprint import scale

    found = scale(networks)
    rows = [(key, f"{value:.3f}") for key, value in zip(networks.arrays, found.rms, strict=True)]
    return _table(
        ("array", "root mean square, 1 as initialised"), [*rows, ("numbers beyond its range", str(found.outside))]
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich.table import Table

    table = Table(show_header=bool(headings), box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table
