"""Visual prompt tuning: its equations by hand in float64, on vision transformers of several makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.composition import Rows, Stack
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.vpt import VisualPromptTuning

transformers = pytest.importorskip("transformers")
N, D = 3, 24
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """As timm names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(D), nn.LayerNorm(D), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.attn.qkv(self.norm1(x)).chunk(3, -1))
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn.proj(read)
        return x + self.mlp.fc2(self.mlp.fc1(self.norm2(x)).relu())


class TimmLike(nn.Module):
    """A vision transformer that averages its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, D, 4, stride=4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 5, D))
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(2 * D, 5)

    def embedded(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embedded(x))
        return self.head(torch.cat((x[:, 0], x[:, 1:].mean(1)), dim=-1))


def vit(name: str = "ViTForImageClassification") -> Any:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**SIZES, image_size=8, patch_size=4, num_labels=3)).eval()


def clip() -> Any:
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()


def strong(model: nn.Module, name: str = "default", **settings: Any) -> AdapterSet:
    adapters = attach(model, VisualPromptTuning(length=N, **settings), name, seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_()
    return adapters


@pytest.mark.parametrize("deep", [False, True])
def test_it_is_the_papers_equations_with_prompts_after_the_class_token(deep: bool) -> None:
    model = TimmLike().double()
    images = IMAGES.double()
    x, blocks = model.embedded(images), list(model.blocks)
    adapters = strong(model, deep=deep)
    (prompts,), Z = adapters.parameters(), None
    got = model(images)
    adapters.activate(None)
    for number, block in enumerate(blocks):  # equations 4 to 7, in the paper's own order of tokens
        P = prompts[number].expand(2, -1, -1) if number < len(prompts) else Z
        out = block(torch.cat((x[:, :1], P, x[:, 1:]), dim=1))
        x, Z = torch.cat((out[:, :1], out[:, 1 + N :]), dim=1), out[:, 1 : 1 + N]
    expected = model.head(torch.cat((x[:, 0], x[:, 1:].mean(1)), dim=-1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (vit, lambda m: m(IMAGES).logits),
        (lambda: vit("DeiTForImageClassificationWithTeacher"), lambda m: m(IMAGES).logits),
        (clip, lambda m: m.get_image_features(IMAGES).pooler_output),
        (TimmLike, lambda m: m(IMAGES)),
    ],
    ids=["vit", "deit", "clip", "timm"],
)
def test_it_acts_and_learns_on_vision_transformers_of_any_make(make: Any, call: Any, deep: bool) -> None:
    model = make()
    base = call(model)
    adapters = strong(model, deep=deep)
    out = call(model)
    assert out.shape == base.shape
    assert not torch.allclose(out, base, atol=1e-4)
    assert sum(p.numel() for p in adapters.parameters()) == N * D * (_blocks(model) if deep else 1)
    out.square().sum().backward()
    adapters.check_gradients()
    adapters.detach()
    assert torch.equal(call(model), base)


def _blocks(model: nn.Module) -> int:
    return 3 if isinstance(model, TimmLike) else 2


def test_the_text_of_clip_has_no_prompts() -> None:
    assert all(site.path.startswith("vision_model") for site in strong(clip()).sites("default"))


def test_hidden_states_and_eager_attention_go_through() -> None:
    model = vit()
    strong(model)
    fused = model(IMAGES, output_hidden_states=True)
    assert fused.hidden_states[-1].shape[1] == 5
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IMAGES).logits, fused.logits)


def test_stacked_prompts_and_rows_of_a_mixed_batch() -> None:
    model = TimmLike()
    adapters = strong(model, "a")
    adapters.add(VisualPromptTuning(length=2, deep=False), "b", seed=1)
    single = {name: adapters.activate(name) or model(IMAGES) for name in ("a", "b", None)}
    adapters.activate(Rows("b", "a"))
    torch.testing.assert_close(model(IMAGES), torch.stack((single["b"][0], single["a"][1])))
    adapters.activate(Stack("a", "b"))
    stacked = model(IMAGES)
    assert all(not torch.allclose(stacked, other, atol=1e-4) for other in single.values())


@pytest.mark.parametrize("deep", [False, True])
def test_what_was_saved_comes_back_and_a_compiled_model_agrees(deep: bool, tmp_path: Path) -> None:
    model = TimmLike()
    state = model.state_dict()
    strong(model, deep=deep).save(tmp_path / "a")
    again = TimmLike()
    again.load_state_dict(state)
    load(again, tmp_path / "a")
    assert torch.equal(again(IMAGES), model(IMAGES))
    torch.compiler.reset()  # what other tests compiled counts against a limit
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(IMAGES), model(IMAGES))


def test_blocks_may_be_named_by_hand() -> None:
    adapters = strong(TimmLike(), targets="blocks.{1,2}")
    assert [site.path for site in adapters.sites("default")] == ["blocks.1", "blocks.2"]
    adapters.model(IMAGES)
    with pytest.raises(TargetError, match="Linear is no transformer block"):
        attach(TimmLike(), VisualPromptTuning(targets="head"))


def test_what_cannot_have_visual_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="length is 0"):
        VisualPromptTuning(length=0)
    with pytest.raises(TargetError, match="Linear has no list of blocks"):
        attach(nn.Linear(3, 5), VisualPromptTuning())
    beit = transformers.BeitConfig(**SIZES, image_size=8, patch_size=4, use_relative_position_bias=True)
    with pytest.raises(TargetError, match=r"goes by the tokens' places .*relative_position"):
        attach(transformers.BeitModel(beit), VisualPromptTuning())
    bert = transformers.BertConfig(**SIZES, vocab_size=20)
    with pytest.raises(TargetError, match="no list of blocks"):
        attach(transformers.BertModel(bert), VisualPromptTuning())
