"""FRoD against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.frod import FRoD, role_of

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Blocks(nn.Module):
    """Two layers of one role, one higher than its basis is wide and one lower."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, O)}) for O in (6, 3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block["up"](x) for block in self.layers]


@torch.no_grad()
def test_a_weight_is_rotated_and_scaled_within_a_shared_basis():
    model, x = Blocks().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    adapters = attach(model, FRoD(density=0.4, targets="*.up"), seed=0)
    shared = adapters.parts("default")["layers.0.up"].shared
    assert list(shared.state_dict()) == ["V_up", "places_up"]
    for block, out in zip(model.layers, model(x), strict=True):
        W, part = block["up"].weight, block["up"].smidgen.get("default")
        V, places = shared.V_up, shared.places_up
        torch.testing.assert_close(part.U @ torch.diag(part.l0) @ V.T, W, rtol=0, atol=1e-12)
        torch.testing.assert_close(out, x @ W.T + block["up"].bias, rtol=0, atol=0)
        nn.init.normal_(part.s)
        nn.init.normal_(part.l)
        S = torch.zeros(4, 4, dtype=torch.float64)
        for value, i, j in zip(part.s, *places, strict=True):
            assert i != j
            S[i, j] += value
        expected = x @ (part.U @ (S + torch.diag(part.l)) @ V.T).T + block["up"].bias
        torch.testing.assert_close(block["up"](x), expected, rtol=0, atol=1e-12)
        assert sum(p.numel() for p in part.parameters(recurse=False)) == 4 + int(0.4 * 4 * 4)


def test_a_singular_basis_does_not_hold_the_weight_and_gradients_are_right_all_the_same():
    layer, x = nn.Linear(4, 6).double(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    part = attach(nn.Sequential(layer), FRoD(density=0.4, targets="0"), seed=0).parts("default")["0"]
    assert part.is_exact
    part.shared.V_0[:, 0] = 0
    part.prepare()
    assert not part.is_exact
    nn.init.normal_(part.s)
    y, W = layer(x), part.merged(layer.weight, None, slice(None))[0]
    dy, of = torch.randn_like(y), (x, part.l, part.s)
    ours, theirs = (torch.autograd.grad(out, of, dy) for out in (y, x @ W.T + layer.bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [3, 60])
def test_one_activation_is_kept_for_few_tokens_and_none_for_many(tokens):
    model, kept = nn.Sequential(nn.Linear(40, 30)), []
    attach(model, FRoD(targets="0"), seed=0)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    x = torch.randn(tokens, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    of_size = [t for t in kept if t.numel() >= 40 * tokens and t.untyped_storage().data_ptr() not in weights]
    assert [tuple(t.shape) for t in of_size] == ([(40, 3)] if tokens == 3 else [(60, 40)])


def test_layers_of_one_role_share_a_basis():
    assert role_of("model.layers.3.self_attn.q_proj") == "self_attn_q_proj"
    assert role_of("encoder.layer.0.attention.output.dense") == "attention_output"
    assert role_of("encoder.layer.0.output.dense") == "output_dense"
    assert role_of("blocks.2.fc") == role_of("fc") == "fc"


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"target_modules": ["q_proj", "v_proj"], "sparse_rate": 0.05}),
        (llama, {"target_modules": ["v_proj", "down_proj"], "save_projection": False, "projection_prng_key": 3}),
        (llama, {"target_modules": ["gate_proj"], "save_projection": False, "regularization_alpha": 0.1}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    config = peft.FrodConfig(progressbar=False, **config)
    if make is gpt2:  # two roles are called mlp_c_proj and attn_c_proj
        from_peft(make, config, change=_grown)
    else:
        from_peft(make, config)


@torch.no_grad()
def _grown(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "frod_lambda" in name:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)


def test_the_basis_in_the_file_counts_and_not_the_one_computed_here():
    """Signs of a decomposition differ from machine to machine."""

    def change(theirs: nn.Module) -> None:
        with torch.no_grad():
            for V in theirs.base_model.frod_V.values():
                V["default"].mul_(-torch.ones(len(V["default"])).cumprod(0) * 2)
            for name, module in theirs.named_modules():
                if hasattr(module, "frod_U") and name.endswith("proj"):
                    U, l = module._calculate_frod_u_and_lambda(module.frod_V["default"], module.base_layer.weight)
                    module.frod_U["default"] = U
                    module.frod_lambda_l["default"].copy_(l * 1.3)
                    module.frod_lambda_s_values["default"].fill_(0.2)

    from_peft(llama, peft.FrodConfig(target_modules=["q_proj"], progressbar=False), change=change)


@pytest.mark.parametrize("settings", [{}, {"save_projection": False, "density": 0.1, "seed": 5}])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, settings):
    to_peft_and_back(make, FRoD(targets=["*.q_proj", "*.v_proj"] if make is llama else ["*.c_attn"], **settings))


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="density is 2"):
        FRoD(density=2)
    with pytest.raises(TargetError, match="as wide and as high as the vocabulary"):
        attach(nn.Sequential(nn.Embedding(3, 2)), FRoD(targets=Targets.of_type(nn.Embedding)))
