"""Prefixes: what all methods have in common that learn keys and values in front of every attention's own.

How they get in front: attention_calls.py.   Positions of real tokens may be counted from N on, as they are where the
prefix sits in the cache: Hugging Face PEFT has it so.
"""

import inspect
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, ByName, Call
from .attention import Front, reach_of, widths_of
from .attention_calls import register, with_in_front
from .errors import TargetError
from .method import Method
from .site import Site
from .targets import Resolution, modules_of


class PrefixMethod(Method):
    """A method whose adapters are `PrefixAdapter`s, at every attention; a fresh prefix is not the base model."""

    length: int  # N
    shift_positions: bool

    def accepts(self, site: Site) -> str | None:
        name = type(site.layer).__name__
        if site.parameter is not None:
            return f"{self.name} goes to an attention module, not to a parameter"
        if reach_of(site.layer) is None:
            return (
                f"{name} computes no attention that can be reached: through transformers' attention interface, "
                "scaled_dot_product_attention, or nn.MultiheadAttention without bias_k"
            )
        return (
            None if widths_of(site.layer) else f"{name} does not tell its key and value width (head_dim and num_heads)"
        )

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        found = list(modules_of(model))
        reached = [path for path, module in found if self.accepts(Site.at(path, module)) is None]
        if not reached:
            own = [f"{path} ({type(m).__name__})" for path, m in found if "attention" in type(m).__name__.lower()]
            why = (
                f"It computes attention by itself in {', '.join(own[:3])}"
                if own
                else "It has no module named attention"
            )
            raise TargetError(f"no attention of {type(model).__name__} can be given a prefix. {why}")
        return reached, {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        if not self.shift_positions:
            return found
        _refuse_own_positions(model)
        return Resolution(model, (*found.sites, Site("", model)), found.passed_over)


class AttentionAdapter(Adapter):
    """At an attention that is reached from outside.

    Not to be weighted: that would call the attention a second time, which would put the tokens in the cache twice.
    """

    by_row = weightable = mergeable = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        reach = reach_of(site.layer)
        assert reach is not None, f"{site.name} was not accepted"
        self.reach = reach
        self._register()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()  # in a process that has only unpickled it

    def _register(self) -> None:
        if self.reach.way == "interface":
            register()


class PrefixAdapter(AttentionAdapter):
    """K (N, Dk) and V (N, Dv) of one attention module, however they are made."""

    starts_as_base = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        widths = widths_of(site.layer)
        assert widths is not None, f"{site.name} was not accepted"
        self.widths = widths

    def front(self) -> Front:
        """K and V as they act now."""
        raise NotImplementedError

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return with_in_front(self.site.layer, self.site.name, self.reach, self.front(), call, *args, **kwargs)


class PositionsAdapter(ByName):
    """At the model: real tokens stand at positions N, N + 1, ...; it has no parameters."""

    by_row = starts_as_base = weightable = mergeable = False

    def __init__(self, length: int, site: Site) -> None:
        super().__init__(site)
        self.length = length

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if positions is None:
            tokens = kwargs.get("input_ids")
            tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens  # (B, T)
            past = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + past)[None]
        kwargs["position_ids"] = positions + self.length
        return call(**kwargs)


def _refuse_own_positions(model: nn.Module) -> None:
    """Raise TargetError where positions are not counted 0, 1, ... from position_ids."""
    counts_padding = any(
        isinstance(table, nn.Embedding) and table.padding_idx is not None and path.endswith("position_embeddings")
        for path, table in model.named_modules()
    )
    if counts_padding or "position_ids" not in inspect.signature(model.forward).parameters:
        raise TargetError(
            f"shift_positions: {type(model).__name__} does not count its positions from position_ids as 0, 1, ..., "
            "so they cannot be shifted"
        )
