"""Prompt tuning: equal to vectors put in front of the embedded tokens by hand, and to Hugging Face PEFT."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.composition import Rows, Stack
from smidgen.core.errors import AttachError, ConfigError, NotMergeable, TargetError
from smidgen.core.targets import Targets
from smidgen.methods.prompt_tuning import PromptTuning

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = TOKENS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
GPT2 = TOKENS | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = TOKENS | {"d_model": 24, "d_ff": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "decoder_start_token_id": 0}
BART = TOKENS | {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Bert", "Roberta", "Electra", "Gemma3Text", "Mamba"), BERT),
    "Llama": BERT | {"num_key_value_heads": 2},
    "GPT2": GPT2,
    "T5": T5,
    "Bart": BART,
}
LANGUAGE_MODELS = ["LlamaForCausalLM", "GPT2LMHeadModel"]
ENCODER_DECODERS = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
CLASSIFIERS = ["BertForSequenceClassification", "LlamaForSequenceClassification", "GPT2ForSequenceClassification"]
IDS = torch.tensor([[3, 9, 27, 21, 4, 12, 36], [50, 41, 14, 42, 17, 51, 44]])
MASKS = {
    "none": torch.ones_like(IDS),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
}
N = 3


def tiny(name: str, **settings: Any) -> Any:
    cls = getattr(transformers, name)
    family = name.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    return cls(cls.config_class(**SETTINGS[family], **settings)).eval()


def strong(model: nn.Module, name: str = "default", length: int = N) -> AdapterSet:
    """A prompt that is not small beside real tokens."""
    adapters = attach(model, PromptTuning(length=length), name, seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_()
    return adapters


def decoded(model: Any) -> dict[str, Tensor]:
    return {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}


@pytest.mark.parametrize("pad", MASKS)
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "BertForTokenClassification", *ENCODER_DECODERS])
def test_it_equals_vectors_in_front_of_the_embedded_tokens(name: str, pad: str) -> None:
    model = tiny(name).double()
    adapters = strong(model)
    (P,) = adapters.parameters()
    got = model(input_ids=IDS, attention_mask=MASKS[pad], **decoded(model)).logits
    by_embeds = model(
        inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASKS[pad], **decoded(model)
    ).logits
    adapters.activate(None)
    both = torch.cat((P.expand(2, -1, -1), model.get_input_embeddings()(IDS)), dim=1)
    mask = F.pad(MASKS[pad], (N, 0), value=1)
    expected = model(inputs_embeds=both, attention_mask=mask, **decoded(model)).logits
    expected = expected if model.config.is_encoder_decoder else expected[:, N:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_embeds, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("pad", MASKS)
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *CLASSIFIERS, *ENCODER_DECODERS])
def test_it_is_hugging_face_pefts_prompt(name: str, pad: str) -> None:
    peft = pytest.importorskip("peft")
    task = {"S": "SEQ_CLS", "C": "SEQ_2_SEQ_LM"}.get(name.split("For")[-1][0], "CAUSAL_LM")
    task = "CAUSAL_LM" if name in LANGUAGE_MODELS else task
    model = tiny(name)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N, num_transformer_submodules=1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapters = strong(model)
    (P,) = adapters.parameters()
    with torch.no_grad():
        P.copy_(theirs.get_prompt_embedding_to_save("default"))
    ids = IDS.masked_fill(MASKS[pad] == 0, 0)
    labels = torch.tensor([0, 1]) if task == "SEQ_CLS" else IDS
    inputs = {"input_ids": ids, "attention_mask": MASKS[pad], "labels": labels}
    ours, other = model(**inputs), theirs(**inputs)
    if pad == "right" and task == "SEQ_CLS" and name != "BertForSequenceClassification":
        # theirs gives the model vectors without ids, so it takes the padding for the last token
        alone = model(input_ids=IDS[:1, :5], attention_mask=MASKS["none"][:1, :5]).logits
        torch.testing.assert_close(ours.logits[:1], alone)
        assert not torch.allclose(ours.logits, other.logits, atol=1e-3)
        return
    expected = other.logits[:, N:] if task == "CAUSAL_LM" else other.logits
    torch.testing.assert_close(ours.logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, other.loss, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # HF PEFT's own
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_prompts_of_encoder_decoders_go_both_ways_with_hf_peft(name: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny(name)
    config = getattr(peft, kind)(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)  # num_transformer_submodules 2
    config.encoder_hidden_size = 8
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = copy.deepcopy(model)
    adapters = load(ours, tmp_path / "theirs")
    expected = theirs(input_ids=IDS, attention_mask=MASKS["right"], decoder_input_ids=IDS).logits
    got = ours(input_ids=IDS, attention_mask=MASKS["right"], decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    adapters.save(tmp_path / "ours", task_type="SEQ_2_SEQ_LM")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    other = again(input_ids=IDS, attention_mask=MASKS["right"], decoder_input_ids=IDS).logits
    torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
    again.save_pretrained(str(tmp_path / "back"))
    load(copy.deepcopy(model), tmp_path / "back")


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *ENCODER_DECODERS])
def test_generating_with_a_cache_gives_what_it_gives_without(name: str) -> None:
    model = tiny(name)
    strong(model)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({}, {"num_beams": 2}, {"attention_mask": MASKS["left"]}):
        cached = model.generate(IDS, **options, **more, use_cache=True)
        assert torch.equal(cached, model.generate(IDS, **options, **more, use_cache=False))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_left_padding_changes_nothing_that_is_generated(name: str) -> None:
    model = tiny(name)
    strong(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    padded = model.generate(F.pad(IDS, (2, 0)), attention_mask=F.pad(torch.ones_like(IDS), (2, 0)), **options)
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    torch.testing.assert_close(torch.stack(padded.logits), torch.stack(plain.logits))


def test_outputs_per_token_come_back_without_the_prompt() -> None:
    model = tiny("BertForTokenClassification")
    strong(model)
    labels = torch.tensor([[0, 1, 1, 0, -100, 0, 1], [1, 0, 1, 0, 1, 1, 0]])
    out = model(IDS, token_type_ids=torch.zeros_like(IDS), labels=labels, output_hidden_states=True)
    assert out.logits.shape == (2, 7, 2)
    assert {tuple(h.shape) for h in out.hidden_states} == {(2, 7, 24)}
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    as_tuple = model(IDS, labels=labels, return_dict=False, output_hidden_states=True)
    torch.testing.assert_close(as_tuple[:2], (out.loss, out.logits))
    assert as_tuple[2][0].shape == (2, 7, 24)


def test_labels_of_a_whole_text_are_left_alone_even_if_there_are_as_many_as_tokens() -> None:
    model = tiny("BertForSequenceClassification", num_labels=7, problem_type="multi_label_classification")
    strong(model)
    labels = torch.rand(2, 7).round()
    out = model(IDS, labels=labels)
    assert out.logits.shape == (2, 7)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels))
    ten = tiny("BertForSequenceClassification", num_labels=7 + N)  # as many as tokens and prompt
    strong(ten)
    assert ten(IDS).logits.shape == (2, 7 + N)


def test_answers_of_question_answering_keep_their_positions() -> None:
    model = tiny("BertForQuestionAnswering")
    strong(model)
    start, end = torch.tensor([1, 2]), torch.tensor([3, 6])
    out = model(IDS, start_positions=start, end_positions=end)
    assert out.start_logits.shape == out.end_logits.shape == (2, 7)
    less = model(IDS, start_positions=start, end_positions=end - 1)
    gap = F.cross_entropy(out.end_logits, end - 1) - F.cross_entropy(out.end_logits, end)
    torch.testing.assert_close((less.loss - out.loss) * 2, gap)  # what the prompt's places take of the softmax cancels


def test_answers_of_an_encoder_decoder_come_back_without_the_prompt() -> None:
    model = tiny("T5ForConditionalGeneration")
    strong(model)
    out = model(IDS, labels=IDS, output_hidden_states=True)
    assert out.encoder_last_hidden_state.shape == out.encoder_hidden_states[0].shape == (2, 7, 24)


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "ElectraForSequenceClassification", *ENCODER_DECODERS])
def test_the_number_of_parameters_is_length_times_width_of_the_embedding(name: str) -> None:
    adapters = strong(tiny(name, **({"embedding_size": 10} if name.startswith("Electra") else {})))
    assert sum(p.numel() for p in adapters.parameters()) == N * (10 if name.startswith("Electra") else 24)


def test_a_prompt_starts_from_words_or_from_their_scale() -> None:
    model = tiny("Gemma3TextModel", head_dim=6)  # its embedding scales what it gives
    embed = model.get_input_embeddings()
    words = embed(torch.arange(60))
    start = {
        "text": PromptTuning(length=5, init="text", init_ids=(7, 8, 9)),
        "cut": PromptTuning(length=2, init="text", init_ids=(7, 8, 9)),
        "vocabulary": PromptTuning(length=5, init="vocabulary"),
        "random": PromptTuning(length=400, init="random"),
    }
    (text,), (cut,), (vocabulary,), (random,) = (
        attach(model, method, name, seed=0).parameters(name) for name, method in start.items()
    )
    assert torch.equal(text, words[[7, 8, 9, 7, 8]])
    assert torch.equal(cut, words[[7, 8]])
    assert all(any(torch.equal(row, word) for word in words) for row in vocabulary)
    torch.testing.assert_close(random.std(), words[1:].std(), rtol=0.1, atol=0)
    again = attach(tiny("Gemma3TextModel", head_dim=6), start["vocabulary"], seed=0).parameters()[0]
    assert again.shape == vocabulary.shape


def test_stacked_prompts_stand_one_after_the_other_and_rows_have_their_own() -> None:
    model = tiny("LlamaForCausalLM")
    adapters = strong(model, "a")
    adapters.add(PromptTuning(length=2, init="vocabulary"), "b", seed=1)
    single = {}
    for name in ("a", "b"):
        adapters.activate(name)
        single[name] = model(IDS).logits
    adapters.activate(Rows("b", "a"))
    torch.testing.assert_close(model(IDS).logits, torch.stack((single["b"][0], single["a"][1])))
    adapters.activate(Stack("a", "b"))
    stacked = model(IDS, labels=IDS)
    adapters.activate(None)
    words = model.get_input_embeddings()(IDS)
    both = torch.cat((*(adapters.parameters(n)[0].expand(2, -1, -1) for n in ("a", "b")), words), dim=1)
    expected = model(inputs_embeds=both, labels=F.pad(IDS, (N + 2, 0), value=-100))
    torch.testing.assert_close(stacked.logits, expected.logits[:, N + 2 :])
    torch.testing.assert_close(stacked.loss, expected.loss)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_copies_and_pickles_give_the_same_and_share_nothing(name: str) -> None:
    model = tiny(name)
    (P,) = strong(model).parameters()
    expected = model(IDS, **decoded(model)).logits
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        P.zero_()
    for other in copies:
        assert torch.equal(other(IDS, **decoded(model)).logits, expected)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification", "BartForConditionalGeneration"])
def test_compiled_in_one_graph_equals_eager_also_after_switching(name: str) -> None:
    model = tiny(name)
    adapters = strong(model)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for active in ("default", None):
        adapters.activate(active)
        torch.testing.assert_close(compiled(IDS, **decoded(model)).logits, model(IDS, **decoded(model)).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_gradients_reach_fp32_vectors_in_a_bf16_model_also_when_checkpointing(name: str) -> None:
    model = tiny(name).bfloat16()
    adapters = strong(model)
    gradients = []
    for _ in range(2):
        out = model(IDS).logits
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        adapters.check_gradients()
        (P,) = adapters.parameters()
        assert P.grad is not None
        assert P.dtype == P.grad.dtype == torch.float32
        gradients.append(P.grad.clone())
        model.zero_grad()
        model.gradient_checkpointing_enable()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_tokens_without_a_prompt_are_embedded_as_ever_and_detaching_restores() -> None:
    model = tiny("LlamaForCausalLM")
    words, before = model.get_input_embeddings()(IDS), model(IDS).logits
    adapters = strong(model)
    assert torch.equal(model.get_input_embeddings()(IDS), words)
    assert not torch.allclose(model(IDS).logits, before, atol=1e-3)
    adapters.detach()
    assert torch.equal(model(IDS).logits, before)
    assert not [key for key in model.__dict__ if "smidgen" in key]


def test_what_cannot_have_a_prompt_is_refused() -> None:
    with pytest.raises(TargetError, match="Linear takes no input_ids"):
        attach(nn.Linear(3, 5), PromptTuning())
    with pytest.raises(TargetError, match="leave targets out"):
        attach(tiny("LlamaForCausalLM"), PromptTuning(targets=Targets("*.q_proj")))
    with pytest.raises(NotMergeable, match="changes activations"):
        strong(tiny("LlamaForCausalLM")).merge()
    for settings, match in (
        ({"length": 0}, "length is 0"),
        ({"init": "words"}, 'init is "words"'),
        ({"init": "text"}, "give both or neither"),
        ({"init_ids": (1,)}, "give both or neither"),
    ):
        with pytest.raises(ConfigError, match=match):
            PromptTuning(**settings)
    with pytest.raises(ConfigError, match=r"\[60\] are no tokens of a vocabulary of 60"):
        attach(tiny("LlamaForCausalLM"), PromptTuning(init="text", init_ids=(3, 60)))


def test_calls_that_have_no_room_for_the_prompt_are_refused() -> None:
    model = tiny("LlamaForCausalLM")
    strong(model)
    with pytest.raises(AttachError, match="one number per token"):
        model(IDS, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(AttachError, match="the call gave nothing"):
        model()
    with pytest.raises(AttachError, match="static"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
    recurrent = tiny("MambaForCausalLM")
    strong(recurrent)
    assert recurrent(IDS).logits.shape == (2, 7, 60)
    with pytest.raises(AttachError, match="use_cache=False"):
        recurrent.generate(IDS, max_new_tokens=2)
