"""P-tuning: a prompt that a small network computes while it is trained.  Liu et al. 2021, arXiv:2103.10385, section 3.

    model([P; embed(tokens)])        P = encoder(Z)        Z: (N, E)

    mlp     P = W3 relu(W2 relu(W1 z + b1) + b2) + b3               W1: (H, E)   W2: (H, H)    W3: (E, H)
    lstm    P = W2 relu(W1 [forward lstm(Z); backward lstm(Z)] + b1) + b2        W1: (2 H, 2 H)  W2: (E, 2 H)

N = length, E = width of the embedding, H = width.   A fresh prompt is not the base model: the tokens attend to it.
Trainable parameters: N E, and mlp: H (E + H + E) + 2 H + E;   lstm, with L layers: 2 L 4 H (I + H + 1), where I is E in
the first layer and 2 H in the others, + 2 H (2 H + 1) + E (2 H + 1).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import method
from ..core.prompt_method import LearnedPrompt, PromptMethod
from ..core.prompts import Prompt
from ..core.site import Site


@method("p_tuning")
@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Learned vectors before the token embeddings, computed by a network that ties them together.

    length: N.   encoder: "mlp" or "lstm"; None learns P itself, which is also what a folder of Hugging Face PEFT's
        holds: there the network is gone, and only what it computed is left.
    width: H; None takes E.   layers: of the LSTM.
    """

    length: int = 20
    encoder: Literal["mlp", "lstm"] | None = "mlp"
    width: int | None = None
    layers: int = 2

    summary = "model([encoder(Z); embed(tokens)])"
    paper = "Liu et al. 2021, arXiv:2103.10385"
    disk = DiskNames("P_TUNING", fields={"length": "num_virtual_tokens"})

    def check(self) -> None:
        require_whole(self, "length", "layers", "width")
        require(self.encoder in ("mlp", "lstm", None), f'encoder is "{self.encoder}"; it is "mlp", "lstm" or None')

    def shared(self, sites: tuple[Site, ...]) -> Prompt:
        if self.encoder is None:
            return LearnedPrompt(self.length, sites[0])
        return EncodedPrompt(self, sites[0])


class EncodedPrompt(Prompt):
    """Z, here `inputs`, and the network that makes P of it."""

    def __init__(self, method: PTuning, site: Site) -> None:
        super().__init__(site)
        E, H = site.fan_out, method.width or site.fan_out
        self.inputs = site.empty(method.length, E)
        is_lstm = method.encoder == "lstm"
        sizes = (2 * H, 2 * H, E) if is_lstm else (E, H, H, E)
        self.recurrent = nn.ModuleList(
            BothWays(site, E if layer == 0 else 2 * H, H) for layer in range(method.layers if is_lstm else 0)
        )
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(site.empty(outputs, inputs) for inputs, outputs in pairs)
        self.biases = nn.ParameterList(site.empty(outputs) for _, outputs in pairs)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.inputs, generator=generator)
        for W, b in zip(self.weights, self.biases, strict=True):
            bound = W.shape[1] ** -0.5  # nn.Linear's own start
            nn.init.uniform_(W, -bound, bound, generator=generator)
            nn.init.uniform_(b, -bound, bound, generator=generator)
        for layer in self.recurrent:
            for parameter in layer.parameters():
                bound = 1 / math.sqrt(parameter.shape[1] / 4)  # nn.LSTM's own: 1 / sqrt(H)
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self) -> Tensor:
        h: Tensor = self.inputs  # (N, E)
        for layer in self.recurrent:
            h = layer(h)
        for number, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = F.linear(F.relu(h) if number else h, W, b)
        return h


class BothWays(nn.Module):
    """One layer of a bidirectional LSTM: (N, I) -> (N, 2 H).   Both directions in one loop, which compiles."""

    def __init__(self, site: Site, inputs: int, width: int) -> None:
        super().__init__()
        self.from_input = site.empty(2, 4 * width, inputs)  # gates i, f, g, o, as in nn.LSTM
        self.from_hidden = site.empty(2, 4 * width, width)
        self.bias = site.empty(2, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack((x, x.flip(0)))  # (2, N, I)
        driven = torch.baddbmm(self.bias[:, None], both, self.from_input.mT)  # (2, N, 4 H)
        h = c = driven.new_zeros(2, 1, self.from_hidden.shape[2])
        outputs = []
        for step in range(x.shape[0]):
            i, f, g, o = torch.baddbmm(driven[:, step : step + 1], h, self.from_hidden.mT).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        out = torch.cat(outputs, dim=1)  # (2, N, H)
        return torch.cat((out[0], out[1].flip(0)), dim=-1)
