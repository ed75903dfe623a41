"""Blocks: where the attentions and feed-forwards of an arbitrary transformer are.

    attentions(model)     Attention("encoder.layer.0.attention", query="encoder.layer.0.attention.self.query", ...)
    feedforwards(model)   FeedForward("layers.0.mlp", inputs=("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"), ...)
    blocks(model)         ["layers.0", "layers.1", ...]

Found by structure: a module owns an attention, or a feed-forward, if it has all the layers of one line of the tables
below, and what comes out is as wide as what goes in (the residual stream).  The names are the field's; a new
architecture is a new line.  Nothing is imported, and class names do not matter.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .errors import TargetError
from .layers import LinearKind, NormKind, kind_of
from .targets import modules_of

# query, key, value, output; a name that repeats is one fused layer
_ATTENTION = (
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),  # DeBERTa-v2, -v3
    ("self.in_proj", "self.in_proj", "self.in_proj", "output.dense"),  # DeBERTa
    ("query", "key", "value", "dense"),  # ALBERT
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT, XLM
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Gemma, Qwen, Mixtral, ViT, Swin
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, OPT, CLIP, GPT-J, GPT-Neo, Whisper, Wav2Vec2
    ("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),  # Phi-3
    ("q", "k", "v", "o"),  # T5, MPNet
    ("q_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2's cross-attention: before the line that it also fits
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2, GPT-BigCode
    ("query_key_value", "query_key_value", "query_key_value", "dense"),  # GPT-NeoX, Falcon, BLOOM
    ("Wqkv", "Wqkv", "Wqkv", "out_proj"),  # MPT
    ("Wqkv", "Wqkv", "Wqkv", "Wo"),  # ModernBERT
    ("qkv", "qkv", "qkv", "proj"),  # timm
)
# inputs (several are gated: they read the same), output
_FEEDFORWARD = (
    (("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa, MPNet
    (("ffn",), "ffn_output"),  # ALBERT
    (("lin1",), "lin2"),  # DistilBERT, XLM
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Gemma, Qwen
    (("gate_up_proj",), "down_proj"),  # Phi-3
    (("up_proj",), "down_proj"),  # MPT
    (("w1", "w3"), "w2"),  # SwiGLU as its authors name it
    (("fc1",), "fc2"),  # BART, OPT, Phi, CLIP, ViT, Swin, timm
    (("linear1",), "linear2"),  # torch.nn.TransformerEncoderLayer
    (("wi_0", "wi_1"), "wo"),  # T5 1.1, mT5
    (("wi",), "wo"),  # T5
    (("c_fc",), "c_proj"),  # GPT-2, GPT-Neo, GPT-BigCode
    (("fc_in",), "fc_out"),  # GPT-J
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    (("intermediate_dense",), "output_dense"),  # Wav2Vec2
    (("Wi",), "Wo"),  # ModernBERT
)
Half = Literal["input", "output"]
_CROSS = ("cross", "encdec", "encoder_attn", "multihead_attn")  # in the owner's name, lower case


@dataclass(frozen=True)
class Attention:
    """One attention: the dotted paths of its layers.

    path: the module that owns them.   query, key, value: one path where they are fused; None in nn.MultiheadAttention,
    which reads them, and its output layer, as parameters without a call.   cross: keys and values of another sequence.
    """

    path: str
    query: str | None
    key: str | None
    value: str | None
    output: str
    cross: bool


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward: the dotted paths of its layers.

    path: the module that owns them.   whole: that module is the feed-forward and nothing else, so that its call takes
    the feed-forward's input and gives its output; False where the layers stand in the block itself (BERT, BART, OPT).
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    whole: bool


def attentions(model: nn.Module) -> list[Attention]:
    """The attentions of a model, or of a part of it, in the order of registration; empty if none is recognised."""
    modules, found = dict(modules_of(model)), []
    for path, module in modules.items():
        cross = any(mark in path.rpartition(".")[2].lower() for mark in _CROSS)
        if isinstance(module, nn.MultiheadAttention):
            found.append(Attention(path, None, None, None, _below(path, "out_proj"), cross))
            continue
        for names in _ATTENTION:
            query, key, value, output = (_below(path, name) for name in names)
            if _is_residual(modules, (query, key, value), output):
                found.append(Attention(path, query, key, value, output, cross))
                break
    return found


def feedforwards(model: nn.Module) -> list[FeedForward]:
    """The feed-forwards of a model, or of a part of it, in the order of registration; empty if none is recognised."""
    modules, found = dict(modules_of(model)), []
    others = [part.path for part in attentions(model)]
    others += [path for path, module in modules.items() if isinstance(kind_of(module), NormKind)]
    for path in modules:
        for input_names, output_name in _FEEDFORWARD:
            inputs, output = tuple(_below(path, name) for name in input_names), _below(path, output_name)
            if _is_residual(modules, inputs, output):
                whole = not any(other.startswith(_below(path, "")) for other in others)
                found.append(FeedForward(path, inputs, output, whole))
                break
    return found


def blocks(model: nn.Module) -> list[str]:
    """Paths of the blocks, each an attention with its feed-forward, in order; empty if no attention is recognised."""
    inner, found = [part.path for part in feedforwards(model)], []
    for part in attentions(model):
        above = _ancestors(part.path)
        numbered = [path for path in above if path.rpartition(".")[2].isdigit()]
        whole = [path for path in numbered or above if any(_is_within(other, path) for other in inner)]
        found += (whole or numbered)[:1]  # without a feed-forward that is recognised, what stands in the list of blocks
    return list(dict.fromkeys(found))


def feedforward_half(path: str) -> tuple[Half, str] | None:
    """By its name alone: whether this layer is the first input or the output of a feed-forward, and that one's path."""
    for inputs, output in _FEEDFORWARD:
        halves: tuple[tuple[Half, str], ...] = (("input", inputs[0]), ("output", output))
        for half, name in halves:
            owner = path.removesuffix(name).removesuffix(".")
            if path == _below(owner, name) and "att" not in owner.rpartition(".")[2]:  # attention.output.dense
                return half, owner
    return None


def output_width(module: nn.Module) -> int | None:
    """How many features a block, attention or feed-forward gives out; None if that cannot be told."""
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    outputs = [part.output for part in feedforwards(module)] + [part.output for part in attentions(module)]
    return _fans(module.get_submodule(outputs[0]))[0] if outputs else None


def not_recognised(model: nn.Module, what: str, example: str) -> TargetError:
    """The error of a method that finds none of `what` in the model; `example` says how to name targets by hand."""
    layers = (path.rpartition(".")[2] for path, module in modules_of(model) if kind_of(module) is not None)
    names = ", ".join(f"*.{name}" for name in list(dict.fromkeys(layers))[:15])
    return TargetError(
        f"no {what} is recognised in {type(model).__name__}. Name the places by hand: {example}. It has: {names}"
    )


def _ancestors(path: str) -> list[str]:
    """The path itself and those above it, the nearest first, the model ("") last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _is_within(path: str, owner: str) -> bool:
    return not owner or path == owner or path.startswith(f"{owner}.")


def _below(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _fans(layer: nn.Module) -> tuple[int, int]:
    kind = kind_of(layer)
    return kind.fans(layer) if isinstance(kind, LinearKind) else (0, 0)


def _is_residual(modules: dict[str, nn.Module], inputs: tuple[str, ...], output: str) -> bool:
    """True if all these are linear layers and the output is as wide as the input of the first."""
    if not all(path in modules for path in (*inputs, output)):
        return False
    widths = [_fans(modules[path]) for path in inputs]
    return all(fan_in > 0 for _, fan_in in widths) and widths[0][1] == _fans(modules[output])[0]
