"""Prompt tuning: learned vectors in front of the embedded tokens.  Lester et al. 2021, arXiv:2104.08691, section 2.

    model([P; embed(tokens)])        P: (N, E)        N = length, E = width of the embedding

Trainable parameters: N E.  In an encoder-decoder the prompt stands in front of the encoder's input.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ..core.checks import require_one_of, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import method
from ..core.prompt_method import LearnedPrompt, PromptMethod, embedded, require_tokens
from ..core.prompts import Prompt
from ..core.site import Site


@method("prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Learned vectors before the token embeddings.

    length: N; 5 to 100 is usual, small models need more.
    init: "random" draws from the scale of the embedding, "vocabulary" starts from the vectors of random tokens, "text"
        from those of `init_ids`, repeated or cut to the length.   The paper finds the last two better in small models.
    init_ids: token ids of a text that describes the task, or of the class labels.
    """

    length: int = 20
    init: Literal["random", "vocabulary", "text"] = "random"
    init_ids: tuple[int, ...] = ()

    summary = "model([P; embed(tokens)])"
    paper = "Lester et al. 2021, arXiv:2104.08691"
    disk = DiskNames("PROMPT_TUNING", fields={"length": "num_virtual_tokens", "init": "prompt_tuning_init"})

    def check(self) -> None:
        require_whole(self, "length")
        require_one_of(self, "init", ("random", "vocabulary", "text"))
        object.__setattr__(self, "init_ids", tuple(self.init_ids))
        with_text = self.init == "text"
        require(bool(self.init_ids) == with_text, 'init_ids are the tokens of init="text": give both or neither')

    def shared(self, sites: tuple[Site, ...]) -> Prompt:
        return WordPrompt(self, sites[0])


class WordPrompt(LearnedPrompt):
    """P (N, E), which may start from the vectors of tokens."""

    def __init__(self, method: PromptTuning, site: Site) -> None:
        super().__init__(method.length, site)
        self.init, self.init_ids = method.init, method.init_ids
        require_tokens(site, self.init_ids)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        count = len(self.prompt)
        if self.init == "random":
            super().reset(generator)
        elif self.init == "text":
            self.prompt.copy_(embedded(self.site, [self.init_ids[i % len(self.init_ids)] for i in range(count)]))
        else:
            ids = torch.randint(self.site.fan_in, (count,), generator=generator, device=self.prompt.device)
            self.prompt.copy_(embedded(self.site, ids))
