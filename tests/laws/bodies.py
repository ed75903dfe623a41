"""The models that the laws are tried on: one layer of every kind, how a weight can be held, and small whole models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import Targets
from smidgen.core.quantised_linear import QuantisedLinear
from smidgen.core.storage import OpaqueStorage, register_storage

ROWS = 3  # of every batch
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Body:
    """A model and a batch for it.

    places: where to put adapters; of these a method gets the first that it can act on.   "auto" is always the last.
    typical: stands for its way of holding adapters in the laws that do not depend on arithmetic.
    in_all_dtypes: try the laws that depend on the dtype in fp64, bf16 and fp16 too.
    fused: while nothing trains, torch runs the bare layer by a kernel that rounds differently.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Inputs]
    places: tuple[Targets, ...]
    typical: bool = False
    in_all_dtypes: bool = False
    fused: bool = False


class Around(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SelfAttention(Around):
    """nn.MultiheadAttention reads its weights without calling a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Recurrent(Around):
    """nn.LSTM reads a list of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Experts(nn.Module):
    """A stack of experts (E, O, I) in one parameter, none linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return torch.einsum("...i,eoi->...eo", x, self.weight).tanh().mean(-2)


class OpaqueLinear(nn.Linear):
    """A linear layer whose weight is whole numbers and a scale, held in a way that smidgen does not know."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        scale = self.weight.detach().abs().max() / 127
        weight = (self.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class UnreadStorage(OpaqueStorage):
    """What such a weight is; reading it would need its scale."""

    name = "unread"

    def matches(self, weight: Tensor) -> bool:
        return weight.dtype == torch.int8


register_storage(UnreadStorage())


def transposed_linear() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 3)
    nn.init.normal_(layer.bias)  # transformers starts it at zero
    return layer


def rms_norm() -> nn.Module:
    return nn.RMSNorm(4)


def trained_batch_norm() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=16,
        initializer_range=0.3,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(ROWS, *shape)}


def indices(*shape: int, name: str = "x") -> Callable[[], Inputs]:
    return lambda: {name: torch.randint(11, (ROWS, *shape))}


def layer(name: str, make: Callable[[], nn.Module], *shape: int, typical: bool = False, dtypes: bool = False) -> Body:
    return Body(name, lambda: Around(make()), floats(*shape), (Targets("layer"),), typical, dtypes)


BODIES = (
    layer("linear", lambda: nn.Linear(3, 5), 2, 3, typical=True, dtypes=True),
    layer("linear_without_bias", lambda: nn.Linear(3, 5, bias=False), 3),
    layer("linear_opaque", lambda: OpaqueLinear(3, 5), 2, 3),
    layer("linear_nf4", lambda: QuantisedLinear(3, 5, format="nf4"), 2, 3),
    layer("linear_int8", lambda: QuantisedLinear(3, 5, format="int8"), 2, 3),
    layer("transposed_linear", transposed_linear, 2, 3),
    layer("conv1d_strided", lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), 3, 7),
    layer("conv2d", lambda: nn.Conv2d(3, 5, (2, 3)), 3, 5, 6, dtypes=True),
    layer("conv2d_1x1", lambda: nn.Conv2d(3, 5, 1, bias=False), 3, 4, 4),
    layer(
        "conv2d_circular_dilated", lambda: nn.Conv2d(3, 5, 3, padding=2, dilation=2, padding_mode="circular"), 3, 6, 6
    ),
    layer("conv2d_same_reflect", lambda: nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), 3, 5, 5),
    layer("conv2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), 4, 5, 5),
    layer("conv2d_depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 4, 4, 4),
    layer("conv3d", lambda: nn.Conv3d(2, 3, 2), 2, 3, 3, 3),
    layer("conv_transpose2d", lambda: nn.ConvTranspose2d(3, 5, (2, 3), stride=2, padding=1, output_padding=1), 3, 4, 5),
    layer("conv_transpose1d_grouped", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False), 4, 7),
    Body(
        "lstm",
        lambda: Recurrent(nn.LSTM(3, 4, batch_first=True, bidirectional=True)),
        floats(5, 3),
        (Targets("layer").parameter("weight_ih_l0", "weight_hh_l0_reverse"), Targets("layer")),
        typical=True,
    ),
    layer("layer_norm", lambda: nn.LayerNorm(4), 2, 4, dtypes=True),
    layer("layer_norm_of_two_axes", lambda: nn.LayerNorm((3, 4)), 2, 3, 4),
    layer("rms_norm", rms_norm, 2, 4),
    layer("batch_norm", trained_batch_norm, 4, 3, 3),
    layer("group_norm", lambda: nn.GroupNorm(2, 4), 4, 3, 3),
    layer("instance_norm", lambda: nn.InstanceNorm2d(4, affine=True), 4, 3, 3),
    Body("embedding", lambda: Around(nn.Embedding(11, 5)), indices(4), (Targets("layer"),), True, in_all_dtypes=True),
    Body("experts", lambda: Around(Experts()), floats(2, 3), (Targets("layer").parameter("weight"),), True),
    Body(
        "multihead_attention",
        lambda: SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)),
        floats(4, 8),
        (Targets("layer").parameter("in_proj_weight", "out_proj.weight"), Targets("layer")),
        typical=True,
        in_all_dtypes=True,
        fused=True,
    ),
    Body(
        "encoder_layer",
        lambda: Around(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)),
        floats(4, 8),
        (
            Targets("layer.self_attn").parameter("in_proj_weight") | Targets("out_proj", "linear1", "linear2"),
            Targets("linear1", "linear2"),
            Targets("layer"),
        ),
        typical=True,
        fused=True,
    ),
    Body("bert", bert, indices(4, name="input_ids"), (), typical=True, in_all_dtypes=True),
    Body("llama", llama, indices(4, name="input_ids"), (), typical=True),
)
