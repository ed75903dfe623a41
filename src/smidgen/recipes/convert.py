"""Rewrite an adapter folder: in Hugging Face PEFT's layout where that can hold it, or as a plain LoRA."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters import AdapterSet, load
from ..conversion import to_lora
from ..core.errors import FolderError, RecipeError, require
from ..core.safe import read_json
from ..formats.note import NOTE
from ..formats.read import read_extra
from ..tasks.loading import load_body
from ..tasks.models import Located, locate
from .save import HEAD

if TYPE_CHECKING:
    from rich.console import Console


def convert(folder: Path, out: Path, *, model: str, to: str, rank: int | None, console: "Console") -> None:
    """Write `folder`'s adapter to `out`; `to` is "same" or "lora".

    Raises RecipeError, FolderError, ModelError or NotMergeable, and then has written nothing.
    """
    require(to in ("same", "lora"), f'--to is "{to}"; it is same or lora', RecipeError)
    require(rank is None or to == "lora", "--rank is of --to lora", RecipeError)
    require(not out.exists(), f"{out} is there already: choose another folder", RecipeError)
    adapters, extra = _loaded(folder, locate(model)), read_extra(folder)
    if to == "same":
        adapters.save(out, base_model=model, extra=extra)
        name = adapters.names[0]
    else:
        before, name = adapters.names, "lora"
        while name in before:
            name += "_"
        report = to_lora(adapters, name=name, rank=rank)
        adapters.activate(name)
        for other in before:
            adapters.delete(other)
        adapters.rename(name, "default")
        adapters.save(out, base_model=model, extra=extra)
        console.print(str(report), highlight=False, markup=False)
    if (folder / HEAD).is_file():  # of a result of `smidgen tune`, which predicts with it
        shutil.copyfile(folder / HEAD, out / HEAD)
    notes = [read_json(path) for path in (out / NOTE, *sorted(out.glob(f"*/{NOTE}"))) if path.is_file()]
    obstacle = next((note["not_peft"] for note in notes if note.get("not_peft")), None)
    reads = f"HF PEFT cannot read it: {obstacle}" if obstacle else "HF PEFT reads it too"
    console.print(f"Written to {out}. {reads}", highlight=False, markup=False)


def _loaded(folder: Path, located: Located) -> AdapterSet:
    """The adapter on the model without a head, as ours are, or else with it, as HF PEFT's mostly are."""
    try:
        return load(load_body(located), folder)
    except FolderError as error:
        try:
            return load(load_body(located, kind=None), folder)
        except FolderError:
            raise error from None
