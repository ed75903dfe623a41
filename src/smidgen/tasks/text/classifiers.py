"""A linear head on the hidden states of a pre-trained body: one line of outputs for each text, or for each word.

    outputs = W z + c       W: (K, 2 D)      z: from the hidden states of the middle and the last layer, side by side

The middle layer often knows what the last forgot.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.errors import ModelError
from ..base import Batch, TaskModel
from ..loading import pooling_for
from .sentence_pooling import pooled


class _Classifier(TaskModel):
    """A body, and the head in fp32."""

    head: nn.Linear

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__()
        config: Any = body.config
        self.body = body
        self.head = nn.Linear(2 * config.hidden_size, outputs, device=next(body.parameters()).device)

    def hidden(self, batch: Batch, *names: str) -> tuple[Tensor, Tensor]:
        """The hidden states of the middle and of the last layer, (N, T, D) each.   names: of the body's inputs."""
        out = self.body(**{name: batch[name] for name in names if name in batch}, output_hidden_states=True)
        return out.hidden_states[len(out.hidden_states) // 2], out.last_hidden_state

    def forward(self, batch: Batch) -> Tensor:
        return cast(Tensor, self.head(self.features(batch)))


class TextClassifier(_Classifier):
    """z: the mean over the tokens; the last token's in decoders, which look backwards.  Gives (N, K)."""

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__(body, outputs)
        self.pooling = pooling_for(body.config)

    def features(self, batch: Batch) -> Tensor:
        """The pooled hidden states, (N, 2 D) in fp32."""
        both = self.hidden(batch, "input_ids", "attention_mask", "token_type_ids")
        return pooled(torch.cat(both, dim=-1), batch["attention_mask"], self.pooling)


class TokenClassifier(_Classifier):
    """z: the first sub-word of each word.  Gives (M, K), a line for each word of the batch."""

    def __init__(self, body: nn.Module, outputs: int) -> None:
        config: Any = body.config
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{config.model_type} is an encoder-decoder; token classification takes an encoder (BERT, DeBERTa ...)"
            )
        super().__init__(body, outputs)

    def features(self, batch: Batch) -> Tensor:
        """The hidden states at each word's first sub-word, (M, 2 D) in fp32."""
        rows, places = (batch["firsts"] >= 0).nonzero(as_tuple=True)
        at = (rows, batch["firsts"][rows, places])
        middle, last = self.hidden(batch, "input_ids", "attention_mask")
        return torch.cat([middle[at], last[at]], dim=-1).float()
