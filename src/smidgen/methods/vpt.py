"""Visual prompt tuning: learned tokens beside those of the image.  Jia et al. 2022, arXiv:2203.12119, section 3.2,
equations 4 to 7.

    shallow     [x_1, Z_1] = L_1([x_0, P])              [x_i, Z_i] = L_i([x_{i-1}, Z_{i-1}])
    deep        [x_i, _] = L_i([x_{i-1}, P_i])

x_i: (B, T, D), the tokens (class token and patches) after block L_i;  P, P_i: (N, D).   N = length, D = width.   The
prompts leave after the last block, so that a norm, a pooling and a head see what they saw before.   They stand behind
the tokens: attention that knows positions from the tokens alone does not care.   A fresh prompt is not the base model.
Trainable parameters: N D shallow, N D per block deep.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter, Call
from ..core.blocks import attentions, feedforwards, output_width
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import TargetError
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.targets import Resolution, modules_of

_KNOWS_PLACES = ("relative_position", "rope", "rotary")  # in the names of parts whose attention goes by order or grid


@method("vpt")
@dataclass(frozen=True, kw_only=True)
class VisualPromptTuning(Method):
    """Learned tokens for vision transformers; with `targets`, between the first and the last block named there.

    length: N; the paper has 1 to 200.   deep: new prompts in every block, which the paper finds better than one.
    """

    length: int = 10
    deep: bool = True

    summary = "[x, P] through the blocks, without P after the last"
    paper = "Jia et al. 2022, arXiv:2203.12119"
    disk = DiskNames("SMIDGEN_VPT")

    def check(self) -> None:
        require_whole(self, "length")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None or site.kind is not None or not _is_block(site.layer):
            return f"{type(site.layer).__name__} is no transformer block, with one attention and a feed-forward"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        return image_blocks(model), {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        ends = found.sites if self.deep else (found.sites[0], *found.sites[1:][-1:])
        return Resolution(model, ends, found.passed_over)

    def build(self, site: Site) -> "PromptedBlock":
        return PromptedBlock(site)

    def shared(self, sites: tuple[Site, ...]) -> "VisualPrompts":
        return VisualPrompts(self, sites)


class VisualPrompts(Shared):
    """P (1, N, D), or P_i of all blocks (L, N, D)."""

    def __init__(self, method: VisualPromptTuning, sites: tuple[Site, ...]) -> None:
        super().__init__()
        self.paths = [site.path for site in sites]
        width = output_width(sites[0].layer)
        assert width is not None, f"{sites[0].name} was not accepted"
        self.prompts = sites[0].empty(len(sites) if method.deep else 1, method.length, width)

    def reset(self, generator: torch.Generator | None) -> None:
        bound = (3 / self.prompts.shape[-1]) ** 0.5  # the authors' sqrt(6 / (3 p^2 + D)), where a patch has D numbers
        nn.init.uniform_(self.prompts, -bound, bound, generator=generator)


class PromptedBlock(Adapter):
    """At one block: prompts come in, or are replaced, and leave after the last."""

    by_row = starts_as_base = weightable = mergeable = False
    shared: VisualPrompts

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.name = next(iter(inspect.signature(site.layer.forward).parameters))  # of the tokens, if given by name

    def prepare(self) -> None:
        self.number = self.shared.paths.index(self.site.path)
        self.is_last = self.number == len(self.shared.paths) - 1

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        x, *others = args if args else (kwargs.pop(self.name),)  # (B, T, D), and N more after the first block
        prompts, N = self.shared.prompts, self.shared.prompts.shape[1]
        if self.number < len(prompts):
            own = prompts[self.number].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat((x if self.number == 0 else x[:, :-N], own), dim=1)
        out = call(x, *others, **kwargs)
        if not self.is_last:
            return out
        return (out[0][:, :-N], *out[1:]) if isinstance(out, tuple) else out[:, :-N]


def image_blocks(model: nn.Module) -> list[str]:
    """Paths of the blocks that read the patches of an image, in order, whatever they are called.

    They stand in one list, and what is around the list cuts images into patches: a convolution as wide as its stride.
    Raises TargetError if there is no such list, or several, or its attention goes by places.
    """
    modules = dict(modules_of(model))
    lists = {path: blocks for path, module in modules.items() if (blocks := _blocks_in(path, module))}
    found = {path: owner for path in lists if (owner := _cuts_patches(modules, path)) is not None}
    if len(found) != 1:
        have = f"{len(found)} lists of blocks that read patches ({', '.join(found)})" if found else "no list of blocks"
        raise TargetError(
            f"{type(model).__name__} has {have}; a vision transformer has one that reads an image's patches. Name the "
            'blocks: VisualPromptTuning(targets="*.blocks.*")'
        )
    ((path, owner),) = found.items()
    names = [name for name, _ in modules[owner].named_modules()] + [n for n, _ in modules[owner].named_parameters()]
    if places := next((name for name in names if any(mark in name for mark in _KNOWS_PLACES)), None):
        raise TargetError(
            f"the attention of {type(model).__name__} goes by the tokens' places ({places}), and prompts have none"
        )
    return lists[path]


def _is_block(module: nn.Module) -> bool:
    return len(attentions(module)) == 1 and bool(feedforwards(module))


def _blocks_in(path: str, module: nn.Module) -> list[str]:
    """The paths of what a list holds, if all are blocks."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    children = list(module.named_children())
    return [f"{path}.{name}" for name, _ in children] if all(_is_block(child) for _, child in children) else []


def _cuts_patches(modules: dict[str, nn.Module], path: str) -> str | None:
    """The path of the nearest module around a list that embeds anything beside it, if it embeds patches."""
    owner = path
    while owner:
        owner = owner.rpartition(".")[0]
        beside = [m for name, m in modules.items() if not _within(name, path) and _within(name, owner)]
        if any(isinstance(m, nn.Conv2d) and m.kernel_size == m.stride and m.stride != (1, 1) for m in beside):
            return owner
        if any(isinstance(m, nn.Embedding) for m in beside):
            return None
    return None


def _within(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f"{owner}.")
