"""Attention within documents that share a row: as a mask has it, computed document by document."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smidgen
from smidgen.core import document_mask
from smidgen.core.blocks import blocks
from smidgen.core.document_mask import DocumentMask, way_of
from smidgen.core.recompute import recompute
from smidgen.training.compiling import compiled

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_lm import tiny_lm

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]])


@pytest.fixture
def mask() -> DocumentMask:
    found = DocumentMask.of(POSITIONS)
    assert found is not None
    return found


def plain(mask: DocumentMask) -> Tensor:
    return mask.as_subclass(Tensor)


def heads(kv_heads: int = 2, **settings) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, count, 12, 8) for count in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, **settings).requires_grad_() for shape in shapes]


def test_a_token_sees_those_of_its_own_document_up_to_itself(mask):
    for row, positions in zip(mask, POSITIONS.tolist(), strict=True):
        for t, position in enumerate(positions):
            assert row[0, t].nonzero()[:, 0].tolist() == list(range(t - position, t + 1))


def test_rows_of_one_document_each_need_no_mask():
    assert DocumentMask.of(torch.arange(5).expand(3, 5)) is None


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_are_those_of_the_mask(mask, kv_heads, scale):
    settings = {"scale": scale, "enable_gqa": kv_heads != 4}
    found = []
    for each in (mask, plain(mask)):
        inputs = heads(kv_heads, dtype=torch.float64)
        y = F.scaled_dot_product_attention(*inputs, attn_mask=each, **settings)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_under_autocast_it_comes_out_in_16_bit_as_attention_does(mask):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (F.scaled_dot_product_attention(*heads(4), attn_mask=each) for each in (mask, plain(mask)))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_what_is_made_of_it_is_a_plain_mask(mask):
    for made in (F.pad(mask, (2, 0), value=True), mask[..., :4], mask.float(), ~mask):
        assert type(made) is Tensor


def test_with_keys_in_front_it_is_a_mask_like_any(mask):
    q, k, v = heads(4)
    front = torch.randn(2, 4, 3, 8)
    widened = F.pad(mask, (3, 0), value=True)
    keys, values = torch.cat((front, k), dim=2), torch.cat((front, v), dim=2)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=widened)
    scores = (q @ keys.transpose(2, 3) * 8**-0.5).masked_fill(~widened, -torch.inf)
    torch.testing.assert_close(y, scores.softmax(-1) @ values)


class Elsewhere:
    """What `way_of` asks of a tensor on a device that is not here."""

    def __init__(self, kind: str, dtype: torch.dtype, width: int = 64, tokens: int = 12) -> None:
        self.device, self.dtype, self.shape, self.ndim = torch.device(kind), dtype, (2, 4, tokens, width), 4


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "capability", "way"),
    [
        ("cpu", torch.float32, 64, None, "apart"),
        ("cpu", torch.bfloat16, 64, None, "apart"),
        ("cuda", torch.bfloat16, 64, (9, 0), "varlen"),
        ("cuda", torch.float16, 256, (8, 0), "varlen"),
        ("cuda", torch.float32, 64, (9, 0), "mask"),
        ("cuda", torch.bfloat16, 512, (9, 0), "mask"),
        ("cuda", torch.bfloat16, 60, (9, 0), "mask"),
        ("cuda", torch.float16, 64, (7, 5), "mask"),
        ("mps", torch.float16, 64, None, "mask"),
    ],
)
def test_the_way_is_chosen_by_device_and_dtype(monkeypatch, kind, dtype, width, capability, way):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    each = Elsewhere(kind, dtype, width)
    assert way_of(each, each, each, 0.0) == way
    assert way_of(each, each, each, 0.1) == "mask"
    assert way_of(each, Elsewhere(kind, dtype, width, tokens=13), each, 0.0) == "mask"


def test_a_torch_without_varlen_attention_keeps_the_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(document_mask, "_varlen_attn", lambda: None)
    each = Elsewhere("cuda", torch.bfloat16)
    assert way_of(each, each, each, 0.0) == "mask"


def test_this_torch_has_varlen_attention_with_all_that_is_asked_of_it():
    assert document_mask._varlen_attn() is not None


def by_hand(query, key, value, starts, starts_of_keys, longest, longest_key, *, scale, window_size, enable_gqa):
    """varlen_attn as its documentation has it: (T, H, d) of all documents one after another."""
    assert window_size == (-1, 0)
    assert starts is starts_of_keys
    assert longest == longest_key == int(starts.diff().max())
    found = []
    for first, end in itertools.pairwise(starts):
        q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))
        found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


def test_varlen_attention_is_given_all_rows_one_after_another(monkeypatch, mask):
    monkeypatch.setattr(document_mask, "way_of", lambda *_: "varlen")
    monkeypatch.setattr(document_mask, "_varlen_attn", lambda: by_hand)
    inputs = heads(2)
    y = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=plain(mask), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(y, expected)


# -- in a model -------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm(tmp_path, "llama")).eval()
    smidgen.attach(model, smidgen.LoRA(rank=2, targets="*_proj"), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    return model


def outcome(model, mask=None) -> list[Tensor]:
    """Logits, and gradients of what is trained."""
    ids = torch.arange(24).view(2, 12)
    logits = model(input_ids=ids, position_ids=POSITIONS, attention_mask=mask, use_cache=False).logits
    logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return [logits.detach(), *gradients]


def same(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def counted(monkeypatch) -> list[bool]:
    """Grows with every attention that is computed document by document."""
    calls, own = [], document_mask._apart
    monkeypatch.setattr(document_mask, "_apart", lambda *args, **kwargs: (calls.append(True), own(*args, **kwargs))[1])
    return calls


def test_logits_and_gradients_of_a_model_are_those_of_its_own_mask(model, mask, monkeypatch):
    expected, calls = outcome(model), counted(monkeypatch)
    same(outcome(model, mask), expected)
    assert len(calls) == 2  # layers


@pytest.mark.parametrize("level", ["cheap", "all"])
def test_blocks_that_recompute_do_so_document_by_document(model, mask, monkeypatch, level):
    expected, calls = outcome(model, mask), counted(monkeypatch)
    recompute(model, level)
    same(outcome(model, mask), expected)
    assert len(calls) == 4  # two layers, twice


def test_prefixes_stand_before_every_document_as_with_a_plain_mask(tmp_path, mask):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm(tmp_path, "llama")).eval()
    smidgen.attach(model, smidgen.PrefixTuning(length=3), seed=0)
    same(outcome(model, mask), outcome(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at inputs
def test_compiled_blocks_take_it_as_a_plain_mask_and_are_compiled_once(model, mask):
    expected = outcome(model)
    with compiled(model, blocks(model)):
        same(outcome(model, mask), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outcome(model, DocumentMask.of(POSITIONS.flip(0)))


def test_methods_that_act_at_places_take_a_row_of_documents_as_one(tmp_path, mask):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm(tmp_path, "llama")).eval()
    smidgen.attach(model, smidgen.LoReFT(rank=2, positions="f1+l1"), seed=0)
    same(outcome(model, mask), outcome(model))


def test_what_is_added_beside_attention_is_added_as_with_a_plain_mask(tmp_path, mask):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lm(tmp_path, "llama")).eval()
    smidgen.attach(model, smidgen.AdaptionPrompt(length=3, layers=1), seed=0)
    same(outcome(model, mask), outcome(model))
