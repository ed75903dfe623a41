"""LoRA on some rows, against loralib's MergedLinear as its code computes it, and against Hugging Face PEFT's LoRA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import AdapterSet, Stack, Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError, TargetError
from smidgen.methods.lora import LoRA
from smidgen.methods.lora_rows import LoRARows

from ..formats.both_ways import run_on, run_text, to_peft_and_back
from ..formats.models import Attention, Mixture, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's and transformers' own
ROWS = ((0, 4), (8, 12))  # q and v of a projection 6 -> 12


@torch.no_grad()
def randomised(adapters: AdapterSet, seed: int = 1) -> AdapterSet:
    generator = torch.Generator().manual_seed(seed)
    for name in adapters.names:
        for p in adapters.parameters(name):
            p.copy_(torch.randn(p.shape, generator=generator))
    return adapters


def attention() -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return Attention().eval()


def fused(**settings: Any) -> tuple[nn.Linear, AdapterSet]:
    """A projection 6 -> 12 in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 12).double()
    settings = {"rank": 2, "alpha": 3.0, "rows_pattern": {"*": ROWS}, "targets": ""} | settings
    return layer, attach(layer, LoRARows(**settings))


def merged_linear(x: Tensor, layer: nn.Linear, A: Tensor, B: Tensor, enabled: list[bool], scale: float) -> Tensor:
    """What loralib's MergedLinear gives.   A: (R n, I)   B: (O / len(enabled) n, R), n of `enabled` being True."""
    n, O = sum(enabled), layer.out_features
    # its merge_AB, conv1d(A, B, groups=n): each part's B meets its own A
    parts = [b @ a for a, b in zip(A.chunk(n), B.chunk(n), strict=True)]
    change, width = torch.zeros_like(layer.weight), O // len(enabled)
    for number in range(len(enabled)):  # its zero_pad
        if enabled[number]:
            change[number * width : (number + 1) * width] = parts.pop(0)
    return F.linear(x, layer.weight, layer.bias) + scale * x @ change.T


@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_one_part_is_loralibs_merged_linear(which: int):
    layer, adapters = fused(rows_pattern={"*": ((4 * which, 4 * which + 4),)})
    (part,) = randomised(adapters).parts("default").values()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = merged_linear(x, layer, part.A, part.B, [number == which for number in range(3)], 1.5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_several_parts_with_an_A_for_each_are_a_stack():
    layer, adapters = fused(rows_pattern={"*": ((0, 4),)})
    adapters.add(LoRARows(rank=2, alpha=3.0, rows_pattern={"*": ((8, 12),)}, targets=""), "v")
    randomised(adapters).activate(Stack("default", "v"))
    q, v = (adapters.parts(name)[""] for name in ("default", "v"))
    x = torch.randn(5, 6, dtype=torch.float64)
    A, B = torch.cat([q.A, v.A]), torch.cat([q.B, v.B])
    expected = merged_linear(x, layer, A, B, [True, False, True], 1.5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_an_A_of_twice_the_rank_and_a_B_of_blocks_are_merged_linear_too():
    layer, adapters = fused(rank=4, alpha=6.0)
    (part,) = randomised(adapters).parts("default").values()
    part.B[:4, 2:] = 0
    part.B[4:, :2] = 0
    x = torch.randn(5, 6, dtype=torch.float64)
    B = torch.cat([part.B[:4, :2], part.B[4:, 2:]])
    expected = merged_linear(x, layer, part.A, B, [True, False, True], 1.5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_all_other_channels_and_rows_stay_to_the_last_bit():
    layer, adapters = fused()
    layer, x = layer.float(), torch.randn(5, 6)
    base, W = F.linear(x, layer.weight, layer.bias), layer.weight.clone()
    randomised(adapters)
    assert torch.equal(layer(x)[:, 4:8], base[:, 4:8])
    assert not torch.isclose(layer(x)[:, :4], base[:, :4]).any()
    adapters.merge()
    assert torch.equal(layer.weight[4:8], W[4:8])
    assert not torch.equal(layer.weight[8:], W[8:])


def test_the_number_of_parameters_is_rank_times_fan_in_and_rows():
    _, adapters = fused(rank=3)
    assert sum(p.numel() for p in adapters.parameters()) == 3 * (6 + 8)


def test_gradients_are_those_of_the_rows_alone():
    layer, adapters = fused()
    (part,) = randomised(adapters).parts("default").values()
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    A, B = part.A.detach().requires_grad_(), part.B.detach().requires_grad_()
    change = torch.zeros_like(layer.weight)
    change = torch.cat([B[:4] @ A, change[4:8], B[4:] @ A])
    F.linear(x, layer.weight + 1.5 * change, layer.bias).square().sum().backward()
    torch.testing.assert_close((part.A.grad, part.B.grad), (A.grad, B.grad))


@torch.no_grad()
def test_experts_have_rows_each():
    torch.manual_seed(0)
    model = Mixture().double()
    targets = Targets("experts").parameter("up")
    adapters = randomised(attach(model, LoRARows(rank=2, alpha=2.0, rows_pattern={"*": ((1, 3),)}, targets=targets)))
    (part,) = adapters.parts("default").values()
    assert (part.A.shape, part.B.shape) == ((3 * 2, 6), (3 * 2, 2))
    change = part.weight_delta(slice(None)).view(3, 8, 6)
    for expert in range(3):
        own = slice(2 * expert, 2 * expert + 2)
        torch.testing.assert_close(change[expert, 1:3], part.B[own] @ part.A[own])
        assert not change[expert, [0, 3, 4, 5, 6, 7]].any()


# -- q, k and v by name


@torch.no_grad()
def test_parts_find_their_rows_and_targets_in_the_model():
    adapters = attach(gpt2(), LoRARows(rank=2))
    method = adapters.method("default")
    assert list(adapters.parts("default")) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert method.rows_pattern["transformer.h.1.attn.c_attn"] == ((0, 32), (64, 96))
    one = attach(gpt2(), LoRARows(rank=2, parts="k", targets="h.0.attn.c_attn"))
    assert list(one.parts("default")) == ["transformer.h.0.attn.c_attn"]


@torch.no_grad()
def test_parts_of_multihead_attention_act_on_its_parameter():
    model, x = attention(), torch.randn(2, 3, 8)
    W = model.attention.in_proj_weight.clone()
    adapters = randomised(attach(model, LoRARows(rank=2, alpha=2.0, parts="v")))
    (part,) = adapters.parts("default").values()
    running = model(x)
    adapters.detach()
    W[16:] += part.B @ part.A
    model.attention.in_proj_weight.copy_(W)
    torch.testing.assert_close(running, model(x))


def test_a_model_without_fused_projections_says_what_to_say():
    with pytest.raises(TargetError, match="LlamaForCausalLM has no layer that is known to hold q, k and v"):
        attach(llama(), LoRARows(parts="q"))


# -- on disk


def test_peft_reads_it_as_a_lora_that_is_zero_elsewhere(tmp_path: Path):
    to_peft_and_back(gpt2, LoRARows(rank=2, parts="qv"), says={"peft_type": "LORA", "target_modules": ["c_attn"]})


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_reads_experts(transposed: bool):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Mixture(transposed)

    rows = {"*.up": ((0, 2), (4, 5)), "first": ((1, 4),)}
    method = LoRARows(rank=2, rows_pattern=rows, targets=Targets("first") | Targets("experts").parameter("up"))
    to_peft_and_back(make, method, run=run_on(torch.randn(5, 7)))


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (gpt2, LoRARows(rank=2, parts="kv")),
        (attention, LoRARows(rank=2, parts="v")),  # in our own layout: HF PEFT would adapt out_proj too
    ],
)
def test_our_note_says_which_rows_they_are(make: Any, method: LoRARows, tmp_path: Path):
    adapters = randomised(attach(make(), method))
    adapters.save(tmp_path / "a")
    model = make()
    found = load(model, tmp_path / "a")
    assert found.method("default").rows_pattern == adapters.method("default").rows_pattern
    for (name, p), (other, q) in zip(adapters.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


def test_without_the_note_it_is_a_plain_lora(tmp_path: Path):
    adapters = randomised(attach(gpt2(), LoRARows(rank=2, parts="kv")))
    adapters.save(tmp_path / "a")
    (tmp_path / "a" / "smidgen.json").unlink()
    model = gpt2()
    found = load(model, tmp_path / "a")
    assert type(found.method("default")) is LoRA
    assert torch.allclose(run_text(model), run_text(adapters.model), atol=1e-5)


def test_a_file_that_was_trained_on_is_not_cut_to_the_rows(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    randomised(attach(gpt2(), LoRARows(rank=2, parts="kv"))).save(tmp_path / "a")
    path, note = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "smidgen.json"
    tensors = load_file(path)
    for name in tensors:
        tensors[name] += 1
    save_file(tensors, path)
    with pytest.raises(FolderError):
        load(gpt2(), tmp_path / "a")
    from smidgen.core.safe import tensor_sha256

    said = json.loads(note.read_text())
    said["tensors"] = {name: tensor_sha256(value) for name, value in tensors.items()}
    note.write_text(json.dumps(said))
    with pytest.raises(FolderError, match=r"c_attn\.lora_B\.weight changes other rows than smidgen\.json says"):
        load(gpt2(), tmp_path / "a")


# -- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"parts": ""}, 'parts is ""; it is some of q, k and v, as "qv"'),
        ({"parts": "qx"}, 'parts is "qx"'),
        ({"parts": "qq"}, 'parts is "qq"'),
        ({"rows_pattern": {"*": ()}}, r'rows_pattern of "\*" is \(\)'),
        ({"rows_pattern": {"*": ((0.5, 2),)}}, "ascending, without overlap"),
        ({"rows_pattern": {"*": ((4, 2),)}}, "ascending, without overlap"),
        ({"rows_pattern": {"*": ((0, 4), (3, 5))}}, "ascending, without overlap"),
        ({"rows_pattern": {"*": ((-1, 4),)}}, "ascending, without overlap"),
        ({"parts": "q", "start": "pissa"}, 'start is "pissa"; it is one of kaiming, gaussian, orthogonal'),
        ({"parts": "q", "bias_on_B": True}, "lora_rows has no bias_on_B"),
    ],
    ids=repr,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        LoRARows(**settings)


def test_a_layer_that_no_pattern_names_and_rows_that_it_has_not_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(TargetError, match="1: rows_pattern says nothing of it"):
        attach(model, LoRARows(rows_pattern={"0": ((0, 2),)}, targets=["0", "1"]))
    with pytest.raises(TargetError, match="1: rows_pattern goes up to 3, and it has 2 channels"):
        attach(model, LoRARows(rows_pattern={"*": ((0, 3),)}, targets=["0", "1"]))


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_every_start_is_that_of_the_base(start: str, kind: type[nn.Module]):
    layer, x = kind(6, 5), torch.arange(6) if kind is nn.Embedding else torch.randn(2, 6)
    base = layer(x)
    attach(layer, LoRARows(rank=2, rows_pattern={"*": ((1, 3),)}, start=start, targets=""))
    torch.testing.assert_close(layer(x), base, rtol=0, atol=1e-7)


def test_a_recipe_says_rows_as_lists():
    from smidgen.recipes.method_part import MethodPart

    method = MethodPart(name="lora_rows", rows_pattern={"*.c_attn": [[0, 4], [8, 12]]}).build()
    assert method == LoRARows(rows_pattern={"*.c_attn": ROWS}, targets=method.targets)
