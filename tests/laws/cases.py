"""Every method on every body that it can act on; and what the laws do to such a case."""

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import smidgen.methods
from smidgen import AdapterSet, Targets, attach
from smidgen.core.adapter import Adapter
from smidgen.core.errors import ConfigError, TargetError
from smidgen.core.method import Method, method_named
from smidgen.core.quantised_linear import QuantisedLinear
from smidgen.core.storage import master_dtype

from .bodies import BODIES, Body

for found in pkgutil.iter_modules(smidgen.methods.__path__):
    importlib.import_module(f"smidgen.methods.{found.name}")

# name of the example -> method, settings.  A new method needs one line here, and is then under all laws.
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "shadow": ("shadow", {"rank": 2, "alpha": 1.0, "dropout": 0.0}),
    "adamss": ("adamss", {"rank": 3, "subspaces": 2, "subspace_rank": 1}),
    "adalora": ("adalora", {"rank": 2, "start_rank": 2, "alpha": 30.0}),
    "adaption_prompt": ("adaption_prompt", {"length": 3}),
    "adaption_prompt_after": ("adaption_prompt", {"length": 2, "projected": False}),
    "alora": ("alora", {"rank": 2, "alpha": 3.0, "invocation_tokens": (3,)}),
    "arrow": ("arrow", {"rank": 2, "train_experts": True, "top_k": 2}),
    "batchnorm_tuning": ("batchnorm_tuning", {}),
    "batchnorm_tuning_adapted": ("batchnorm_tuning", {"statistics": "adapted"}),
    "bdlora": ("bdlora", {"rank": 3, "alpha": 3.0, "blocks": 3, "diagonal_A": ("layer",)}),
    "bdlora_halves": ("bdlora", {"rank": 2, "alpha": 1.5, "blocks": 2}),
    "beft": ("beft", {}),
    "bitfit": ("bitfit", {}),
    "boft": ("boft", {"block_size": 3}),
    "boft_of_two_factors": ("boft", {"block_size": 2, "factors": 2}),
    "bottleneck": ("bottleneck", {"width": 3, "non_linearity": "tanh"}),
    "bottleneck_normed": ("bottleneck", {"width": 3, "placement": "normed", "non_linearity": "tanh"}),
    "bottleneck_parallel": ("bottleneck", {"width": 3, "non_linearity": "tanh", "placement": "parallel", "scale": 2.0}),
    "cartridge": ("cartridge", {"length": 3, "init_ids": (4, 2, 7)}),
    "compacter": ("compacter", {"kronecker": 2, "width": 4, "non_linearity": "tanh"}),
    "conv_adapter": ("conv_adapter", {"compression": 2, "non_linearity": "tanh"}),
    "conv_adapter_sequential": ("conv_adapter", {"placement": "convolution_sequential", "non_linearity": "tanh"}),
    "cpt": ("cpt", {"token_ids": (1, 4, 2), "token_types": (1, 2, 4), "epsilon": 99.0, "format_epsilon": 99.0}),
    "delora": ("delora", {"rank": 2, "bound": 4.0}),
    "diff_pruning": ("diff_pruning", {"budget": 1.0, "l0_weight": 0.0, "gate_start": 0.5}),
    "direft": ("direft", {"rank": 2, "positions": "f1"}),
    "dora": ("dora", {"rank": 2, "alpha": 3.0}),
    "c3a": ("c3a", {"block_size": 1}),
    "c3a_of_blocks": ("c3a", {"block_size": 4}),
    "fourierft": ("fourierft", {"frequencies": 9, "scale": 20.0}),
    "head": ("head", {}),
    "hira": ("hira", {"rank": 2}),
    "gralora": ("gralora", {"rank": 2, "alpha": 3.0, "blocks": 1, "hybrid_rank": 1}),
    "gralora_of_four_blocks": ("gralora", {"rank": 4, "alpha": 5.0}),
    "hra": ("hra", {"rank": 2}),
    "hra_orthogonalised": ("hra", {"rank": 2, "orthogonalise": True}),
    "ia3": ("ia3", {}),
    "ia3_on_input": ("ia3", {"feedforward": ("layer", "linear2")}),
    "invertible": ("invertible", {"non_linearity": "tanh"}),
    "invertible_glow": ("invertible", {"coupling": "glow", "non_linearity": "tanh"}),
    "lily": ("lily", {"rank": 2, "stride": 2, "experts": 3}),
    "llama_adapter_v2": ("llama_adapter_v2", {"length": 2}),
    "ln_tuning": ("ln_tuning", {}),
    "loha": ("loha", {"rank": 2, "alpha": 4.0, "effective_conv": True}),
    "loha_thin": ("loha", {"rank": 1, "alpha": 3.0}),
    "lokr": ("lokr", {"rank": 1, "alpha": 3.0, "decompose_both": True, "effective_conv": True}),
    "lokr_whole": ("lokr", {"rank": 8, "alpha": 12.0}),
    "kasa": ("kasa", {"rank": 2, "alpha": 3.0}),
    "lora": ("lora", {"rank": 2, "alpha": 3.0}),
    "lora_bias_on_B": ("lora", {"rank": 2, "alpha": 3.0, "bias_on_B": True}),
    "lora_fa": ("lora_fa", {"rank": 2, "alpha": 1.0}),
    "lora_mica": ("lora", {"rank": 2, "alpha": 1.0, "start": "mica"}),
    "lora_pissa": ("lora", {"rank": 2, "alpha": 3.0, "start": "pissa"}),
    "lora_rows": ("lora_rows", {"rank": 2, "alpha": 3.0, "rows_pattern": {"*": ((0, 1), (2, 3))}}),
    "loreft": ("loreft", {"rank": 2, "positions": "f2"}),
    "loreft_of_all_tokens": ("loreft", {"rank": 2, "positions": "all", "non_linearity": "tanh"}),
    "monteclora": ("monteclora", {"rank": 2, "alpha": 3.0, "samples": 3, "sample_scale": 0.5}),
    "mtl_lora": ("mtl_lora", {"rank": 2, "alpha": 3.0, "tasks": 2, "task": 1, "mixtures": 2}),
    "multitask_prompt_tuning": ("multitask_prompt_tuning", {"length": 2, "tasks": 3, "rank": 2, "task": 1}),
    "noreft": ("noreft", {"rank": 2, "positions": "f1+l1", "share_weights": True}),
    "miss": ("miss", {"rank": 2}),
    "miss_bat": ("miss", {"rank": 1, "variant": "bat"}),
    "miss_mini": ("miss", {"rank": 3, "variant": "mini", "mini_rank": 2}),
    "oft": ("oft", {"block_size": 2}),
    "oft_constrained": ("oft", {"blocks": 1, "block_share": True, "coft": True, "eps": 0.3, "cayley_neumann": False}),
    "p_tuning": ("p_tuning", {"length": 3, "width": 4}),
    "p_tuning_lstm": ("p_tuning", {"length": 3, "encoder": "lstm", "width": 4}),
    "osf": ("osf", {}),
    "prefix_tuning": ("prefix_tuning", {"length": 2, "init_std": 0.5}),
    "prefix_tuning_reparametrised": ("prefix_tuning", {"length": 2, "reparametrisation": 3, "init_std": 0.5}),
    "prompt_tuning": ("prompt_tuning", {"length": 2}),
    "pvera": ("pvera", {"rank": 6}),
    "randlora": ("randlora", {"rank": 2, "alpha": 0.5}),
    "qalora": ("qalora", {"rank": 2, "alpha": 3.0, "group_size": 3}),
    "qalora_pairs": ("qalora", {"rank": 2, "alpha": 1.5, "group_size": 2}),
    "psoft": ("psoft", {"rank": 2}),
    "psoft_by_series": ("psoft", {"rank": 3, "sharing": "pissa_init", "cayley_neumann": True, "eps": 0.3}),
    "road": ("road", {"group_size": 2}),
    "road_4": ("road", {"variant": "road_4", "group_size": 4}),
    "selective": ("selective", {"budget": 0.3, "by": "magnitude"}),
    "shira": ("shira", {"rank": 1}),
    "ssf": ("ssf", {}),
    "supertuning": ("supertuning", {"sparsity": 0.7}),
    "supertuning_with_rank": ("supertuning", {"sparsity": 0.8, "rank": 2, "save_indices": False}),
    "frod": ("frod", {"density": 0.3}),
    "glora": ("glora", {"rank": 2, "D_E": "none"}),
    "glora_vector": ("glora", {"A_B": "vector", "C": "vector", "D_E": "none"}),
    "deft": ("deft", {"rank": 2}),
    "deft_qr": ("deft", {"rank": 2, "decomposition": "qr", "para": True}),
    "peanut": ("peanut", {"rank": 2, "depth": 1, "non_linearity": "tanh"}),
    "poly": ("poly", {"rank": 2, "skills": 2, "sampled": False}),
    "tinylora": ("tinylora", {"length": 4, "weight_tying": 0.5}),
    "trainable_tokens": ("trainable_tokens", {"tokens": (4, 1, 2)}),
    "unilora": ("unilora", {"rank": 2, "length": 9, "bound": 1.0}),
    "vblora": ("vblora", {"rank": 2, "vectors": 6, "vector_length": 1, "bank_bound": 0.65}),
    "vpt": ("vpt", {"length": 2}),
    "vpt_shallow": ("vpt", {"length": 2, "deep": False}),
    "xlora": ("xlora", {"rank": 2, "train_experts": True, "width": 6, "depth": 2, "dropout": 0.0, "pass_value": 0.5}),
    "xlora_layerwise": (
        "xlora",
        {
            "experts": ("x", "y", "z"),
            "rank": 2,
            "train_experts": True,
            "layerwise": True,
            "top_k": 2,
            "softmax_top_k": True,
        },
    ),
    "vera": ("vera", {"rank": 6}),
    "waveft": ("waveft", {"frequencies": 9, "scale": 2.0, "wavelet": "db3"}),
    "waveft_without_transform": ("waveft", {"frequencies": 9, "scale": 2.0, "use_idwt": False}),
    "velora": ("velora", {"rank": 2, "alpha": 3.0, "groups": 2}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# norm(difference) / norm(output): what rounding of the base's dtype may do
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """One method on one body in one dtype."""

    example: str
    body: Body
    targets: Targets
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f"-{str(self.dtype).removeprefix('torch.')}"
        return f"{self.example}-{self.body.name}{dtype}"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def method(self) -> Method:
        name, settings = EXAMPLES[self.example]
        return method_named(name)(targets=self.targets, **settings)

    def model(self) -> nn.Module:
        """The base model, the same each time."""
        return base_model(self.body, self.dtype)

    def attached(self, *names: str, fresh: bool = False) -> tuple[nn.Module, AdapterSet]:
        """The base model with adapters of these names, "a" if none is given, away from their start unless fresh."""
        model, names = self.model(), names or ("a",)
        adapters = attach(model, self.method(), names[0], seed=1)
        for number, name in enumerate(names[1:]):
            adapters.add(self.method(), name, seed=2 + number)
        if not fresh:
            for number, name in enumerate(names):
                perturb(adapters, name, seed=number)
        return model, adapters

    def run(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """The model's output for these rows of the body's batch."""
        return output_of(model(**{name: x[rows] for name, x in self.batch().items()}))

    def batch(self) -> dict[str, Tensor]:
        """What the model is run on, the same each time."""
        return batch_for(self.body, self.dtype)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """True if these are the same bits; near each other where torch has two kernels for one layer."""
        return gap(one, other) <= self.tolerance if self.body.fused else torch.equal(one, other)

    @property
    def is_mergeable(self) -> bool:
        """True if every part can become part of a weight that can be written."""
        return all(part.mergeable and part.site.kind and part.site.storage.plain for part in parts_of(self))

    @property
    def is_quantised_anew(self) -> bool:
        """True if merging quantises the weight anew: it is refused by what is lost, not by what the adapter is."""
        parts = parts_of(self)
        return all(part.mergeable and part.site.kind for part in parts) and any(
            isinstance(part.site.layer, QuantisedLinear) and part.site.parameter is None for part in parts
        )

    @property
    def is_weightable(self) -> bool:
        """True if a share of what the adapter changes has a meaning."""
        return all(part.weightable for part in parts_of(self))


@functools.cache
def parts_of(case: Case) -> tuple[Adapter, ...]:
    """The parts of an adapter of this case, to ask for their traits."""
    _, adapters = case.attached()
    return tuple(adapters.parts("a").values())


def base_model(body: Body, dtype: torch.dtype) -> nn.Module:
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every kind of device, which takes long
    return body.make().to(dtype).eval()


@functools.cache
def batch_for(body: Body, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.default_generator.manual_seed(1)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in body.batch().items()}


def output_of(out: Any) -> Tensor:
    """The tensor that a model's output is about."""
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def perturb(adapters: AdapterSet, name: str, seed: int = 0) -> None:
    """Move an adapter away from where it started, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters(name):
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def gap(one: Tensor, other: Tensor) -> float:
    """norm(difference) / norm(other)."""
    assert one.shape == other.shape
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def merged_values(adapters: AdapterSet, name: str) -> dict[str, Tensor]:
    """The base's parameters with an adapter in them, by name, for torch.func.functional_call."""
    values: dict[str, Tensor] = {}
    for site in adapters.sites(name):
        adapter = adapters.parts(name)[site.name]
        b = None if site.bias is None else site.bias.flatten().to(master_dtype(site.bias))
        W = site.weight().to(master_dtype(site.stored))
        W, b = adapter.merged(W, b, slice(None))
        prefix = f"{site.path}." if site.path else ""
        values[prefix + (site.parameter or "weight")] = site.linear.as_stored(site.stored, W).to(site.stored.dtype)
        if b is not None and site.bias is not None:
            values[prefix + "bias"] = b.view(site.bias.shape).to(site.bias.dtype)
    return values


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases that there are: for every example and body the first place where the method can act."""
    return tuple(
        Case(example, body, place, dtype)
        for example in EXAMPLES
        for body in BODIES
        if (place := _place(example, body)) is not None
        for dtype in (DTYPES if body.in_all_dtypes else DTYPES[:1])
        if _base_runs(body, dtype)
    )


def _place(example: str, body: Body) -> Targets | None:
    places = (*body.places, Targets.auto())
    return next((place for place in places if _accepts(example, body, place)), None)


def _accepts(example: str, body: Body, targets: Targets) -> bool:
    model = base_model(body, torch.float32)
    try:
        method = Case(example, body, targets).method()
        method.fitted(model).resolve(model)
    except (ConfigError, TargetError):
        return False
    return True


@functools.cache
def _base_runs(body: Body, dtype: torch.dtype) -> bool:
    try:
        base_model(body, dtype)(**batch_for(body, dtype))
    except RuntimeError:  # not on this processor
        return False
    return True
