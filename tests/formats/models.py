"""Small models that the tests of this folder adapt."""

import torch
from torch import Tensor, nn


def llama(**settings: object) -> nn.Module:
    """A 2-layer Llama of width 32 whose k and v are 16 wide; the same weights every time."""
    return _transformer("LlamaForCausalLM", **settings)


def llama_classifier(**settings: object) -> nn.Module:
    """The same with a fresh `score` head for three classes, different each time."""
    torch.seed()
    return _transformer("LlamaForSequenceClassification", num_labels=3, head_seed=True, **settings)


def gpt2() -> nn.Module:
    """A 2-layer GPT-2 of width 32, whose layers are Conv1D."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()


def _transformer(name: str, head_seed: bool = False, **settings: object) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
    if head_seed:
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(torch.seed() % (1 << 40)))
    return model


class Net(nn.Module):
    """One of each kind of layer; input (B, 5) of word numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.image = nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.up = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.words(ids).transpose(1, 2))  # (B, 6, 5)
        h = self.image(h[..., None])[..., 0]  # (B, 4, 3)
        return self.up(self.grouped(h).transpose(1, 2))


class Experts(nn.Module):
    """Two weights of three stacked experts and a matrix, read without a call; `is_transposed`: held as (E, in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 6, 8) if is_transposed else torch.randn(3, 8, 6))
        self.bias = nn.Parameter(torch.randn(8))
        self.down = nn.Parameter(torch.randn(3, 8, 5) if is_transposed else torch.randn(3, 5, 8))
        self.out = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        h = torch.einsum("bi,eio->beo", x, up) + self.bias
        return torch.einsum("beo,eop->bp", h, down) @ self.out.T


class Mixture(nn.Module):
    """Experts between two linear layers; input (B, 7)."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6)
        self.experts = Experts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x))


class Attention(nn.Module):
    """nn.MultiheadAttention, which calls neither of its layers; input (B, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x)[0])
