"""Folders of AdapterHub's package `adapters` 1.3.0 give the outputs that it gave.

others/adapterhub.* were written once by that package, on transformers 4.57: three tiny models with a language model's
head, adapters moved by noise, and the logits of `batch()`.  The json holds each adapter_config.json as it was written
and the names and shapes of the tensors, which lie one after the other in the safetensors.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from smidgen import Stack, adapters_of, load
from smidgen.core.errors import FolderError

HERE = Path(__file__).parent / "others"
VALUES, TOLD = load_file(HERE / "adapterhub.safetensors"), json.loads((HERE / "adapterhub.json").read_text())
VARIANTS = [name for name in TOLD if "_" in name]
SMALL = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def unpacked(name: str) -> dict[str, Tensor]:
    sizes = [torch.Size(shape) for shape in TOLD[name]["tensors"].values()]
    parts = VALUES[name].split([size.numel() for size in sizes])
    return {key: part.view(size) for key, part, size in zip(TOLD[name]["tensors"], parts, sizes, strict=True)}


def model(family: str) -> Any:
    if family == "bert":
        config = transformers.BertConfig(**SMALL, max_position_embeddings=32)
        made = transformers.BertForMaskedLM(config)
    elif family == "llama":
        config = transformers.LlamaConfig(**SMALL, max_position_embeddings=32, num_key_value_heads=1)
        made = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=23, n_embd=8, n_layer=2, n_head=2, n_inner=12, n_positions=32)
        made = transformers.GPT2LMHeadModel(config)
    assert not made.load_state_dict(unpacked(family), strict=False).unexpected_keys
    return made.eval()


def batch() -> dict[str, Tensor]:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": mask}


def written(folder: Path, variant: str, safe: bool = False, **changes: Any) -> Path:
    """The folder that it saved.   changes: of the inner config."""
    folder.mkdir()
    config = json.loads(json.dumps(TOLD[variant]["config"]))
    config["config"] |= changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = unpacked(variant)
    for key, tensor in list(state.items()):
        if ".prefix_tunings." in key:  # which every layer has a second time
            copied = key.replace("prefix_tuning.", "encoder.layer.0.attention.self.prefix_tuning.pool.", 1)
            state[copied] = tensor.clone()
    save_file(state, folder / "adapter.safetensors") if safe else torch.save(state, folder / "pytorch_adapter.bin")
    return folder


def told_apart(variant: str) -> dict[str, Any]:
    """What a folder of NoReFT or DiReFT has to say in addition."""
    return {"subtract_projection": variant == "bert_noreft"} if variant in ("bert_noreft", "bert_direft") else {}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_its_folders_give_its_outputs(tmp_path: Path, variant: str) -> None:
    made, there = model(variant.split("_")[0]), batch()["attention_mask"].bool()
    base = made(**batch()).logits[there]
    adapters = load(made, written(tmp_path / "folder", variant, safe=len(variant) % 2 == 0, **told_apart(variant)))
    out, expected = made(**batch()).logits[there], VALUES[f"{variant}/logits"][there]
    assert (expected - base).norm() > 0.05 * base.norm()
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    adapters.save(tmp_path / "ours")
    again = model(variant.split("_")[0])
    load(again, tmp_path / "ours")
    assert torch.equal(again(**batch()).logits[there], out)


def test_what_is_one_adapter_there_can_be_several_here(tmp_path: Path) -> None:
    made = model("bert")
    adapters = load(made, written(tmp_path / "inv", "bert_seq_bn_inv"))
    assert adapters.active == Stack("a", "a_invertible")
    assert [adapters.method(name).name for name in adapters.names] == ["bottleneck", "invertible"]
    load(made, written(tmp_path / "mam", "bert_mam"), "mam")
    assert adapters.names[2:] == ["mam", "mam_bottleneck"]
    assert adapters.active == Stack("a", "a_invertible")


def test_an_invertible_adapter_is_undone_where_their_code_undoes_it(tmp_path: Path) -> None:
    for of_class, of_package, places in (
        ("BertForMaskedLM", "adapters.1.3.0", ["bert.embeddings"]),
        ("BertAdapterModel", "adapters.1.3.0", ["bert.embeddings", "cls.predictions.decoder"]),
        ("BertForMaskedLM", "3.2.1", ["bert.embeddings", "cls.predictions.decoder"]),
    ):
        folder = written(tmp_path / f"{of_class}{of_package}", "bert_seq_bn_inv")
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"model_class": of_class, "version": of_package}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        adapters = load(model("bert"), folder)
        assert [site.path for site in adapters.sites("a_invertible")] == places


def test_a_model_may_have_another_head_or_none(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, max_position_embeddings=32)
    whole = model("bert")
    for other in (transformers.BertModel(config), transformers.BertForTokenClassification(config)):
        body = other if type(other) is transformers.BertModel else other.bert
        body.load_state_dict(whole.bert.state_dict(), strict=False)
        other.eval()
        for variant in ("bert_mam", "bert_lora", "bert_compacter", "bert_seq_bn_inv"):
            folder = tmp_path / f"{type(other).__name__}{variant}"
            adapters, expected = load(other, written(folder, variant)), load(whole, folder)
            torch.testing.assert_close(body(**batch())[0], whole.bert(**batch())[0])
            adapters.detach()
            expected.detach()


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("bert_seq_bn", {"ln_after": True}, "cannot be done here: ln_after = True"),
        ("bert_seq_bn", {"use_gating": True, "dropout": 0.1}, "use_gating = True, dropout = 0.1"),
        ("bert_seq_bn", {"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add'"),
        ("bert_seq_bn", {"original_ln_after": False}, "original_ln_after = False"),
        ("bert_seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity is 'leakyrelu'; read are relu, gelu"),
        ("bert_seq_bn_inv", {"inv_adapter": "glow"}, "couples positions, not features: read is nice"),
        ("bert_compacter", {"shared_W_phm": True}, "shared_W_phm = True"),
        ("bert_lora", {"use_dora": True}, "use_dora = True"),
        ("bert_lora", {"architecture": "mtl_lora"}, "architecture is 'mtl_lora'; read are bottlenecks"),
        ("bert_noreft", {}, 'the same config for both.*"subtract_projection": true for NoReFT'),
        ("bert_prefix_tuning_flat", {"use_gating": True}, "use_gating = True"),
        ("llama_seq_bn", {"is_parallel": True}, "parallel adapters are read for bert"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    tmp_path: Path, variant: str, changes: dict[str, Any], message: str
) -> None:
    made = model(variant.split("_")[0])
    with pytest.raises(FolderError, match=message):
        load(made, written(tmp_path / "folder", variant, **changes))
    assert adapters_of(made) is None


def test_a_folder_of_another_model_or_with_other_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is for llama, this model is bert"):
        load(model("bert"), written(tmp_path / "llama", "llama_seq_bn"))
    folder = written(tmp_path / "t5", "bert_seq_bn")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(FolderError, match="is for 't5'; read are those for bert, roberta"):
        load(model("bert"), folder)
    state = unpacked("bert_compacter")
    folder = written(tmp_path / "bare", "bert_compacter")
    torch.save({k: v for k, v in state.items() if "phm_rule" not in k}, folder / "pytorch_adapter.bin")
    with pytest.raises(FolderError, match=r"no phm_rule.*save it again from a model with a head"):
        load(model("bert"), folder)
    torch.save(state | {"bert.what.else": torch.zeros(2)}, folder / "pytorch_adapter.bin")
    with pytest.raises(FolderError, match=r"1 of 26 tensors have no place: bert\.what\.else"):
        load(model("bert"), folder)
    half = {k: v for k, v in unpacked("bert_seq_bn").items() if "adapter_up.bias" not in k}
    torch.save(half, written(tmp_path / "half", "bert_seq_bn") / "pytorch_adapter.bin")
    with pytest.raises(FolderError, match=r"output\.LayerNorm has no net\.up_bias"):
        load(model("bert"), tmp_path / "half")
    small = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL | {"num_hidden_layers": 1}))
    with pytest.raises(FolderError, match=r"it has no bert\.encoder\.layer\.1"):
        load(small, written(tmp_path / "deep", "bert_seq_bn"))
