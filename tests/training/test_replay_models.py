"""Where models of different families end to be frozen: found by watching them, and the same forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smidgen
from smidgen import LoRA, Targets

from .test_replay import Model, found, kept

T = pytest.importorskip("transformers")

TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 12}
T5 = {"vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "dropout_rate": 0.0}
BART = {"vocab_size": 12, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")} | {"pad_token_id": 11, "encoder_ffn_dim": 24}
VIT = {**TEXT, "image_size": 8, "patch_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "layer_type": "basic"}


class Read(nn.Module):
    """A model of transformers that reads digits: as tokens, as source and target, or as a picture."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        digits, mask = batch["digits"], batch["mask"]
        names = type(self.model).__name__
        if names in ("ViTModel", "ResNetModel"):
            counts = (F.one_hot(digits, 10).float() * mask[:, :, None]).sum(1)[:, :8]
            pixels = (counts[:, :, None] * counts[:, None]).log1p()[:, None].expand(-1, 3, -1, -1)
            hidden = self.model(pixel_values=pixels).last_hidden_state
            return hidden.flatten(2).mean(2)[:, :6] if names == "ResNetModel" else hidden.mean(1)[:, :6]
        given = {"input_ids": digits, "attention_mask": mask.long()}
        if self.model.config.is_encoder_decoder:
            return self.model(**given, decoder_input_ids=digits[:, :1]).last_hidden_state[:, -1, :6]
        hidden = self.model(**given).last_hidden_state
        return ((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))[:, :6]


@pytest.mark.parametrize(
    ("make", "top", "expected"),
    [
        (lambda: T.GPT2Model(T.GPT2Config(vocab_size=12, n_embd=16, n_layer=3, n_head=2)), "h.2", ["h.1"]),
        (lambda: T.LlamaModel(T.LlamaConfig(**TEXT)), "layers.2", ["layers.1"]),
        (lambda: T.DebertaV2Model(T.DebertaV2Config(**TEXT)), "encoder.layer.2", ["encoder.layer.1"]),
        (
            lambda: T.BartModel(T.BartConfig(**BART)),
            "decoder.layers.1",
            ["encoder", "decoder.layers.0"],  # cross-attention reads the encoder
        ),
        (
            # a block hands on its position bias beside the hidden states, so it is cut inside
            lambda: T.T5Model(T.T5Config(**T5)),
            "decoder.block.2",
            ["encoder", "decoder.block.1.layer.2"],
        ),
        (lambda: T.ViTModel(T.ViTConfig(**VIT)), "layers.2", ["layers.1"]),
        (lambda: T.ResNetModel(T.ResNetConfig(**RESNET)), "encoder.stages.2", ["encoder.stages.1"]),
    ],
)
def test_the_cut_is_where_the_top_block_reads(make, top, expected):
    torch.manual_seed(0)
    model = Model(Read(make()))
    inside = Targets(lambda path, layer: path.startswith(f"model.{top}.") and hasattr(layer, "weight"))
    smidgen.attach(model.body, LoRA(rank=2, targets=inside), seed=0)
    units, why = found(model)
    assert (kept(units), why) == ([f"body.model.{path}" for path in expected], "")
