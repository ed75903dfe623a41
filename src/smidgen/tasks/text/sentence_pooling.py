"""How a model's tokens become one vector: as sentence-transformers says in the model's folder, else by its kind.

mean    sum of mask_t h_t / sum of mask_t           cls    h_1           last   h of the last token
max     per dimension the largest h_t               then z / |z|, so that inner products are cosines
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ModelError
from ..base import Asked, Batch, TaskModel
from ..loading import first_line, pooling_for
from ..models import Located

Pooling = Literal["mean", "cls", "last", "max"]
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
_PROMPTS = {"query_prompt": ("query",), "document_prompt": ("document", "passage")}
_DONE_HERE = ("Transformer", "Pooling", "Normalize")  # the modules that `pool` stands for
_SAY = "Say task.pooling to tune it without"


class Embedder(TaskModel):
    """A pre-trained body whose last hidden states are pooled.  forward(batch) -> (B, S, D): S texts of each row.

    batch: "input_ids" and "attention_mask" of all sides, one after the other (S B, T); or "input_ids.SIDE" and
    "attention_mask.SIDE" (B, T) of each, where they are of so different a length that a call each costs less.
    """

    def __init__(self, body: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.body, self.head, self.pooling = body, nn.Identity(), pooling

    def forward(self, batch: Batch) -> Tensor:
        sides = [name.removeprefix("input_ids") for name in batch if name.startswith("input_ids")]
        vectors = torch.cat([self._vectors(batch[f"input_ids{s}"], batch[f"attention_mask{s}"]) for s in sides])
        return vectors.view(-1, len(batch["targets"]), vectors.shape[-1]).transpose(0, 1)

    def _vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, D)
        return F.normalize(pooled(hidden, mask, self.pooling), dim=1)


def as_trained(asked: Asked, pooling: Pooling | None, prompts: Mapping[str, str | None]) -> dict[str, Any]:
    """Pooling and prompts: as said, else as the model was trained; entered in the plan.

    prompts: "query_prompt" and "document_prompt", as far as said.
    """
    trained = pooling or trained_pooling(asked.model, asked.revision)
    why = "as the model was trained" if trained else "usual for a model of this kind"
    chosen = trained or usual_pooling(asked.model, asked.revision)
    values: dict[str, Any] = {"pooling": asked.plan.decide("pooling", pooling, chosen, why)}
    known = trained_prompts(asked.model, asked.revision)
    for name, said in prompts.items():
        prompt = next((known[key] for key in _PROMPTS[name] if known.get(key)), "")
        if said is not None or prompt:
            prompt = asked.plan.decide(name, said, prompt, "the model was trained with it")
        values[name] = prompt
    return values


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector (N, D) in fp32 of the hidden states (N, T, D) of each row.   mask: (N, T), padded at the end."""
    hidden = hidden.float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if pooling == "max":
        return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1)


def trained_pooling(located: Located, revision: str | None = None) -> Pooling | None:
    """The pooling that modules.json and the pooling's config name; None where the model has none.

    Raises ModelError for a pooling or a layer that is not known here: without it the vectors would not be the model's.
    """
    found: Pooling | None = None
    for module in _read(located, "modules.json", revision) or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _DONE_HERE:
            raise ModelError(f"{located.name} passes its vectors through a layer {kind}, which is not loaded. {_SAY}")
        if kind == "Pooling":
            config = _read(located, f"{module['path']}/config.json", revision) or {}
            found = _pooling_of(config, located)
    return found


def usual_pooling(located: Located, revision: str | None = None) -> Pooling:
    """The last token where the model looks backwards, else the mean.  Raises ModelError for encoder-decoders."""
    located.refuse_yolo()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(located.source, revision=revision or "main")
    except Exception as error:
        raise ModelError(f"the config of {located.name} cannot be loaded: {first_line(error)}") from error
    return pooling_for(config)


def trained_prompts(located: Located, revision: str | None = None) -> Mapping[str, str]:
    """What was put before texts when the model was trained, by name: "query" -> "query: "."""
    config = _read(located, "config_sentence_transformers.json", revision) or {}
    return {str(name): str(prompt) for name, prompt in (config.get("prompts") or {}).items()}


def save_trained(
    folder: str | Path, pooling: Pooling, prompts: Mapping[str, str], *, width: int, max_length: int | None
) -> None:
    """Write beside a model what `trained_pooling` and `trained_prompts` read, and sentence-transformers."""
    place = Path(folder)
    folders = [f"{i}_{kind}" if i else "" for i, kind in enumerate(_DONE_HERE)]
    modules = [
        {"idx": i, "name": str(i), "path": folders[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(_DONE_HERE)
    ]
    switches = {name: mode == pooling for name, mode in _MODES.items() if name.startswith("pooling_mode_")}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **switches},
        "sentence_bert_config.json": {"max_seq_length": max_length},
        "config_sentence_transformers.json": {"prompts": dict(prompts), "similarity_fn_name": "cosine"},
    }
    for name in folders:
        (place / name).mkdir(exist_ok=True)
    for name, content in files.items():
        (place / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _pooling_of(config: Mapping[str, Any], located: Located) -> Pooling:
    switched = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    modes = switched or [str(config.get("pooling_mode", "nothing"))]
    found = " + ".join(_MODES.get(mode, mode) for mode in modes)
    if found not in get_args(Pooling) or config.get("include_prompt") is False:
        found += "" if config.get("include_prompt", True) else " without the prompt"
        known = ", ".join(get_args(Pooling))
        raise ModelError(f"{located.name} pools by {found}; known are {known}. {_SAY}")
    return cast(Pooling, found)


def _read(located: Located, name: str, revision: str | None) -> Any:
    """A JSON file of the model, from its folder or the hub; None where it has none.  Raises ModelError."""
    path: Path | None = Path(located.source) / name
    if not located.is_local:
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(located.source, name, revision=revision or "main")
        except OSError:  # not there, or no network: the weights will not load either
            return None
        path = Path(found) if found else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{located.name}: {name} is not JSON: {error}") from error
