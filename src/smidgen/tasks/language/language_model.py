"""A causal language model whose loss is taken where there is something to learn, and whose logits are never all there.

    h = body(tokens) up to its output layer     (B, T, D)
    loss of token t+1 = cross entropy of s W h_t      for the t whose next token is a target: core/linear_cross_entropy

The body is called as a whole, so that adapters at the model itself (prompts) act; its output layer is given no row,
and what would have gone in is taken from there.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from ...core.document_mask import DocumentMask
from ...core.errors import ModelError, RecipeError
from ...core.linear_cross_entropy import linear_cross_entropy_rows
from ...data.conversations import Kind
from ..base import Asked, Batch, TaskModel
from .token_rows import IGNORED

Packing = Literal["auto", "on", "off"]

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}  # name -> power
_WINDOWS = ("sliding_window", "attention_chunk_size")  # of a configuration: a token does not see all before it
_SAME = 1e-3  # of the largest number: fp32 in another order, not another computation


@dataclass(frozen=True)
class Shaping:
    """What a model does to the outputs u of its output layer: logits = c tanh(s u / c), or s u without a cap c."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """As the model's configuration tells it: Gemma, Cohere, Granite, Falcon-H1 ..."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = 1.0
        for name, power in _FACTORS.items():
            scale *= (getattr(text, name, None) or 1.0) ** power
        return cls(scale, next(filter(None, (getattr(text, name, None) for name in _CAPS)), None))

    def __call__(self, u: Tensor) -> Tensor:
        z = self.scale * u
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@contextmanager
def given_to(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer is given meanwhile, (rows, T, D); it is called with no place of it, so that it has nothing to do."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        caught.append(args[0])
        return (args[0][:, :0],)

    handle = layer.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()


def likelihoods(
    hidden: Tensor, targets: Tensor, layer: nn.Module, bias: Tensor | None, shaping: Shaping
) -> dict[str, Tensor]:
    """Per row, each (rows,): "loss" summed, how many "tokens" are to be learned, how many of those are "right".

    hidden: what goes into the output layer, (rows, T, D), or more places, which are not looked at.
    targets: of each of these places, (rows, T).   bias: of the logits, (V,), beside the layer's own.
    """
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    hidden = hidden[rows, places]  # (M, D)
    losses, right = linear_cross_entropy_rows(
        hidden,
        layer,
        bias,
        targets[rows, places],
        scale=shaping.scale,
        softcap=shaping.softcap,
    )
    counts = torch.zeros(len(targets), dtype=torch.int64, device=rows.device)
    return {
        "loss": losses.new_zeros(len(targets)).index_add(0, rows, losses),
        "tokens": counts.index_add(0, rows, torch.ones_like(rows)),
        "right": counts.index_add(0, rows, right.long()),
    }


class LanguageModel(TaskModel):
    """A pre-trained causal language model; it has all it needs, so there is no head of the task's.

    forward(batch) -> `likelihoods`.   batch: "input_ids" and "targets" (rows, T), and "attention_mask", or
    "position_ids" that begin at 0 with each document of a packed row.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Identity()
        self.shaping = Shaping.of(body.config)
        takes = inspect.signature(body.forward).parameters
        self.call = {"use_cache": False} if "use_cache" in takes else {}
        self.takes_positions = "position_ids" in takes
        self.attends_apart = False  # documents of a packed row: a `DocumentMask` is given, and not made by the model
        if self.output_layer() is None:
            raise ModelError(
                f"{type(body).__name__} does not tell its output layer: get_output_embeddings() gives None"
            )

    def output_layer(self) -> nn.Module:
        """The layer that makes logits of hidden states; adapters may live there."""
        return cast(nn.Module, cast(Any, self.body).get_output_embeddings())

    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What goes into the output layer, (rows, T, D), in the dtype it goes in with."""
        given = {name: value for name, value in batch.items() if name not in ("targets", "weights")}
        if self.attends_apart and "position_ids" in given:
            mask = DocumentMask.of(given["position_ids"])
            given |= {} if mask is None else {"attention_mask": mask}
        with given_to(self.output_layer()) as caught:
            self.body(**given, **self.call)
        return caught[0][:, -batch["input_ids"].shape[1] :]  # a prompt in front has places too

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return likelihoods(self.hidden(batch), batch["targets"][:, 1:], self.output_layer(), None, self.shaping)

    @torch.no_grad()
    def check(self) -> None:
        """Raise ModelError where a token sees later ones, or logits are made in a way that `shaping` does not tell."""
        name, ids = type(self.body).__name__, self._ids(6)
        hidden = self.hidden({"input_ids": ids})
        if not _same(self.hidden({"input_ids": ids[:, :3]}), hidden[:, :3]):
            raise ModelError(
                f"{name} lets a token see those that come after it, so it is no causal language model but an encoder: "
                "text_classification, token_classification and embeddings take it"
            )
        logits = self.body(input_ids=ids, **self.call).logits
        own = self.shaping(self.output_layer()(hidden))
        if own.shape != logits.shape or not _same(own, logits):
            raise ModelError(
                f"{name} does something to the outputs of its output layer that is not known here "
                f"(known: {', '.join((*_CAPS, *_FACTORS))}), so its loss cannot be computed without all its logits"
            )

    @torch.no_grad()
    def why_not_packed(self) -> str | None:
        """None if two documents in a row, told apart by their positions, give what each gives alone; else why not."""
        if not self.takes_positions:
            return "the model takes no position_ids"
        return None if self._tells_apart() else "the model looks across documents that share a row"

    @torch.no_grad()
    def attend_apart(self) -> None:
        """Have attention in packed rows computed document by document, where this model takes that and all is the same.

        Not where its tokens see only some of those before them: such masks the model has to make itself.
        """
        config = cast(Any, self.body).config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        sees_all = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        if text._attn_implementation != "sdpa" or not sees_all or any(getattr(text, name, None) for name in _WINDOWS):
            return
        self.attends_apart = True
        try:
            self.attends_apart = self._tells_apart()
        except Exception:  # a model that makes more of its mask may refuse one of four dimensions, in words of its own
            self.attends_apart = False

    def _tells_apart(self) -> bool:
        """Whether two documents that share a row give what each gives alone."""
        ids, first = self._ids(12), 5
        positions = torch.cat([torch.arange(first), torch.arange(ids.shape[1] - first)]).to(ids.device)[None]
        packed = self.hidden({"input_ids": ids, "position_ids": positions})
        alone = [self.hidden({"input_ids": some}) for some in (ids[:, :first], ids[:, first:])]
        return _same(packed, torch.cat(alone, dim=1))

    def _ids(self, count: int) -> Tensor:
        """Some tokens, (1, count); all different where the vocabulary allows."""
        vocabulary = cast(Any, self.body).get_input_embeddings().num_embeddings
        ids = torch.arange(1, count + 1, device=next(self.body.parameters()).device) * 37
        return (ids % int(vocabulary))[None]


def decide_packing(said: Packing, kind: Kind, model: LanguageModel, asked: Asked, *, weighted: bool = False) -> bool:
    """Whether rows of a kind share blocks, entered in the plan.   weighted: rows count differently in the loss.

    Raises RecipeError where they are to and cannot.
    """
    why_not = "its prompt stands in front of the first document alone" if asked.reserved else None
    why_not = "each has a weight of its own" if weighted else why_not
    if said == "off" or (said == "auto" and kind != "text"):
        why_not = "batches are of rows of like length, so little is padded, and a step sees as many rows as it has"
    elif (why_not := why_not or model.why_not_packed()) and said == "on":
        raise RecipeError(f"task.packing is on, but rows cannot share a block: {why_not}")
    if not why_not:
        model.attend_apart()
    how = "attention is computed in each alone" if model.attends_apart else "a mask keeps them apart"
    why = why_not or f"documents share blocks and do not see each other ({how}); checked on this model"
    return asked.plan.decide("packing", None if said == "auto" else not why_not, not why_not, why)


def _same(a: Tensor, b: Tensor) -> bool:
    tolerance = _SAME if a.dtype == torch.float32 else 50 * _SAME
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())
