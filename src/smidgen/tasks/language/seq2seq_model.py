"""An encoder-decoder whose logits of a whole batch never exist: losses of h W^T + b are made chunk by chunk.

    h = what goes into the output layer, (rows, T, D): T5's hidden states with their scale already on them
    logits = c tanh(s (h W^T + b) / c)      b: BART's final_logits_bias      s, c: as language_model.Shaping

The body is called as a whole, so that adapters at the model itself act.
"""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import ModelError
from ..base import Batch, TaskModel
from .language_model import Shaping, given_to, likelihoods
from .saying import GREEDY
from .token_rows import IGNORED

_SOURCE = ("input_ids", "attention_mask")  # of a batch
_SAME = 1e-3  # of the largest logit: fp32 in another order, not another computation
_KEPT = (  # of the model's own settings for writing; its beams and penalties are left out
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)


class Seq2SeqModel(TaskModel):
    """A pre-trained encoder-decoder; it has all it needs, so there is no head of the task's.

    forward(batch) -> `likelihoods`; where no gradient is asked for, in eval mode, also what it has "said" to the rows
    "written", (W, T') ids.
    batch: "input_ids" and "attention_mask" (rows, S), "targets" (rows, T), and perhaps "written" (rows,) bool.
    """

    says: int | None = None  # tokens, at most
    begins: Mapping[str, int] = MappingProxyType({})  # settings of generation in place of the model's own

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Identity()
        self.shaping = Shaping.of(getattr(body.config, "decoder", body.config))
        takes = inspect.signature(body.forward).parameters
        if "decoder_input_ids" not in takes or cast(Any, body).get_output_embeddings() is None:
            raise ModelError(f"{type(body).__name__} is no encoder-decoder that writes text (T5, BART, Marian ...)")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        layer = cast(Any, self.body).get_output_embeddings()
        outputs = likelihoods(self.hidden(batch), batch["targets"], layer, self.bias(), self.shaping)
        judged = not self.training and not torch.is_grad_enabled()
        if judged and self.says is not None and "written" in batch and batch["written"].any():
            outputs["said"] = self.say({name: batch[name][batch["written"]] for name in _SOURCE}, self.says)
        return outputs

    def hidden(self, batch: Batch) -> Tensor:
        """What goes into the output layer at each place of the targets, (rows, T, D)."""
        source, starts = {name: batch[name] for name in _SOURCE}, self.decoder_inputs(batch["targets"])
        with given_to(cast(Any, self.body).get_output_embeddings()) as caught:
            self.body(**source, decoder_input_ids=starts, use_cache=False)
        return caught[0]

    def decoder_inputs(self, targets: Tensor) -> Tensor:
        """What the decoder reads, (rows, T): the targets one place later, as the model itself moves them."""
        body = cast(Any, self.body)
        if hasattr(body, "prepare_decoder_input_ids_from_labels"):
            return cast(Tensor, body.prepare_decoder_input_ids_from_labels(labels=targets))
        start, filler = body.config.decoder_start_token_id, body.config.pad_token_id
        moved = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], dim=1)
        return moved.masked_fill(moved == IGNORED, filler)

    def bias(self) -> Tensor | None:
        """Of the logits, (V,), where it is the model's and not the output layer's."""
        bias: Tensor | None = getattr(self.body, "final_logits_bias", None)
        return None if bias is None else bias[0]

    @torch.no_grad()
    def check_logits(self, batch: Batch) -> None:
        """Raise ModelError where the model makes its logits in a way that is not known here."""
        source = {name: batch[name] for name in _SOURCE}
        own = self.body(**source, labels=batch["targets"], use_cache=False).logits
        u = cast(Any, self.body).get_output_embeddings()(self.hidden(batch))
        bias = self.bias()
        ours = self.shaping(u if bias is None else u + bias)
        tolerance = _SAME if own.dtype == torch.float32 else 50 * _SAME
        if ours.shape != own.shape or (ours - own).abs().max() > tolerance * own.abs().max():
            raise ModelError(
                f"{type(self.body).__name__} does something between its decoder and its logits that is not known here, "
                "so its loss cannot be computed without all its logits"
            )

    @torch.no_grad()
    def say(self, batch: Batch, count: int) -> Tensor:
        """What the model writes to each row, (rows, at most `count` + 1) ids: the likeliest token each time."""
        from transformers import GenerationConfig

        body = cast(Any, self.body)
        kept = {name: getattr(body.generation_config, name, None) for name in _KEPT}
        how = cast(Any, GenerationConfig)(**{**kept, **self.begins}, **GREEDY, max_new_tokens=count)
        given = {name: batch[name].to(body.device) for name in _SOURCE}
        return cast(Tensor, body.generate(**given, generation_config=how))
