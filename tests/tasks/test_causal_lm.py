"""Causal language models: the loss against transformers' own, packing without leaks, rows, metrics, samples."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import smidgen
from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError, RecipeError
from smidgen.data.table import Table
from smidgen.tasks.base import Asked
from smidgen.tasks.causal_lm import CausalLM, CausalLMSettings
from smidgen.tasks.language import language_model
from smidgen.tasks.language.language_model import LanguageModel, decide_packing
from smidgen.tasks.language.saying import room, say
from smidgen.tasks.language.token_rows import IGNORED, best_fit, blocks, pieces
from smidgen.tasks.models import locate

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_bert
from tiny_lm import tiny_lm, tokenizer_of

KINDS = ("llama", "gpt2", "gemma2", "granite", "cohere")
SHAPING = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_lm(tmp_path_factory.mktemp(kind), kind, **SHAPING.get(kind, {})) for kind in KINDS}


@pytest.fixture
def llama(folders):
    return folders["llama"]


def asked_of(folder, **settings) -> Asked:
    return Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0, **settings)


def table(**columns) -> Table:
    count = len(next(iter(columns.values())))
    return Table(columns, [f"rows.jsonl:{i + 1}" for i in range(count)])


def chats(*pairs) -> Table:
    return table(messages=[[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs])


def ready(folder, rows, asked=None, **settings):
    asked = asked or asked_of(folder)
    task = CausalLM.understand({"train": rows}, CausalLMSettings(**settings), asked)
    model = task.build(asked)
    task.settle(model, rows, asked)
    return task, model.eval(), asked


def answers(task, model, examples, indices):
    batch = task.collate(examples, indices)
    return task.answer(model(batch), batch)


TALK = chats(("Hi", "Hello you"), ("What is the colour of the sky?", "Blue"), ("And of grass?", "Green, I think"))
TEXTS = table(text=["the colour of hello", "what is", "a longer one of what the user is", "of it"] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own_over_the_learned_tokens(folders, kind):
    task, model, _ = ready(folders[kind], TALK)
    batch = task.collate(task.encode(TALK), [0, 1, 2])
    outputs = model(batch)
    loss, count = task.loss(outputs, batch)
    logits = model.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["targets"][:, 1:]
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
    torch.testing.assert_close(outputs["loss"], expected, rtol=1e-4, atol=1e-4)
    assert count == int((targets != IGNORED).sum())
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-4)
    right = ((logits.argmax(2) == targets) & (targets != IGNORED)).sum(1)
    assert outputs["right"].tolist() == right.tolist()


def test_no_logits_are_made_of_tokens_that_are_not_learned(llama, monkeypatch):
    task, model, _ = ready(llama, TALK)
    batch = task.collate(task.encode(TALK), [0, 1, 2])
    made = []
    linear = F.linear

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        if weight.shape[0] == model.output_layer().weight.shape[0]:
            made.append(out.shape[:-1].numel())
        return out

    monkeypatch.setattr(F, "linear", watched)
    model(batch)
    assert sum(made) == int((batch["targets"] != IGNORED).sum())


def test_gradients_are_those_of_all_logits(llama):
    task, model, _ = ready(llama, TALK)
    batch = task.collate(task.encode(TALK), [0, 1, 2])
    adapters = smidgen.attach(model.body, smidgen.LoRA(rank=2, targets="*.q_proj"), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05)
    loss, _ = task.loss(model(batch), batch)
    own = torch.autograd.grad(loss, adapters.parameters())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model.body(**inputs).logits[:, :-1]
    whole = F.cross_entropy(logits.transpose(1, 2), batch["targets"][:, 1:], ignore_index=IGNORED, reduction="sum")
    for a, b in zip(own, torch.autograd.grad(whole, adapters.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [smidgen.LoRA(rank=2, targets="lm_head"), smidgen.PromptTuning(length=4), smidgen.PrefixTuning(length=4)],
    ids=lambda method: method.name,
)
def test_adapters_at_the_output_layer_and_in_front_of_the_model_act(llama, method):
    task, model, _ = ready(llama, TALK)
    batch = task.collate(task.encode(TALK), [0, 1, 2])
    base = model(batch)
    adapters = smidgen.attach(model.body, method, seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    outputs = model(batch)
    logits = model.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), batch["targets"][:, 1:], ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(outputs["loss"], expected.sum(1), rtol=1e-4, atol=1e-4)
    assert (outputs["loss"] - base["loss"]).abs().min() > 1e-4
    loss, _ = task.loss(outputs, batch)
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(loss, adapters.parameters()))


def test_padding_changes_no_row(llama):
    task, model, _ = ready(llama, TALK)
    examples = task.encode(TALK)
    together = answers(task, model, examples, [0, 1, 2])
    alone = torch.cat([answers(task, model, examples, [i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_documents_in_a_packed_row_do_not_see_each_other(folders, kind):
    task, model, asked = ready(folders[kind], TEXTS)
    assert ("packing", "True") in [entry[:2] for entry in asked.plan.entries]
    documents = task.rows.tokens(TEXTS.select([0, 2, 1]))
    [block] = blocks(documents, 100)
    order = best_fit([len(ids) for ids, _ in documents], 100)[0]
    padded = {name: torch.tensor([values + [0] * 3]) for name, values in block.items() if name != "targets"}
    hidden = model.hidden(padded)[0]
    alone = [model.hidden({"input_ids": torch.tensor([documents[i][0]])})[0] for i in order]
    torch.testing.assert_close(hidden[:-3], torch.cat(alone), rtol=0, atol=1e-5)


def test_packed_and_unpacked_texts_have_the_same_loss(llama):
    packed, model, _ = ready(llama, TEXTS, max_length=64)
    single, _, _ = ready(llama, TEXTS, max_length=64, packing="off")
    sums = []
    for task in (packed, single):
        examples = task.encode(TEXTS)
        sums.append(answers(task, model, examples, range(len(examples))).sum(0))
    assert len(packed.encode(TEXTS)) < len(single.encode(TEXTS)) == len(TEXTS)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-3)


def test_a_long_text_is_packed_in_pieces_and_nothing_of_it_is_lost(llama):
    task, _, _ = ready(llama, table(text=["the colour of hello " * 20, "short"]), max_length=16)
    examples = task.encode(table(text=["the colour of hello " * 20]))
    assert examples.truncated == 0
    assert sum(examples.lengths) == len(task.rows.tokens(table(text=["the colour of hello " * 20]))[0][0])
    assert max(examples.lengths) <= 16


def test_a_model_that_sees_across_documents_is_not_packed(llama):
    class Leaky(LanguageModel):
        def hidden(self, batch):
            return super().hidden(batch).cumsum(1)

    asked = asked_of(llama)
    task = CausalLM.understand({"train": TEXTS}, CausalLMSettings(), asked)
    model = Leaky(task.build(asked).body)
    assert "looks across" in model.why_not_packed()
    assert not decide_packing(task.settings.packing, task.shape.kind, model, asked)
    assert ("packing", "False", model.why_not_packed()) in asked.plan.entries
    wanted = CausalLM.understand({"train": TEXTS}, CausalLMSettings(packing="on"), asked)
    with pytest.raises(RecipeError, match="packing is on, but rows cannot share a block: the model looks across"):
        decide_packing(wanted.settings.packing, wanted.shape.kind, model, asked)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attention_in_packed_rows_is_computed_document_by_document(folders, kind, monkeypatch):
    task, model, _ = ready(folders[kind], TEXTS, max_length=64)
    assert model.attends_apart
    examples = task.encode(TEXTS)
    batch = task.collate(examples, range(len(examples)))
    apart = model(batch)["loss"]
    model.attends_apart = False
    torch.testing.assert_close(apart, model(batch)["loss"], rtol=1e-5, atol=1e-4)


def test_a_model_whose_tokens_see_a_window_makes_its_masks_itself(folders):
    _, gemma, asked = ready(folders["gemma2"], TEXTS)
    assert not gemma.attends_apart
    assert any(name == "packing" and "a mask keeps them apart" in why for name, _, why in asked.plan.entries)


def test_attention_written_out_keeps_its_masks(llama):
    _, model, _ = ready(llama, TEXTS)
    model.attends_apart = False
    model.body.set_attn_implementation("eager")
    model.attend_apart()
    assert not model.attends_apart


def test_a_model_that_refuses_such_a_mask_makes_its_own(llama, monkeypatch):
    def refuses(positions):
        raise ValueError("a mask has two dimensions")

    monkeypatch.setattr(language_model.DocumentMask, "of", refuses)
    _, model, _ = ready(llama, TEXTS)
    assert not model.attends_apart


def test_the_plan_says_how_many_documents_a_block_has(llama):
    for settings, rows in (({}, TEXTS), ({"packing": "on"}, TALK)):
        task, _, asked = ready(llama, rows, max_length=64, **settings)
        blocks_made = len(task.encode(rows))
        said = next(value for name, value, _ in asked.plan.entries if name == "documents in a block")
        assert said == f"{len(rows) / blocks_made:.1f}"


def test_a_prompt_in_front_rules_packing_out(llama):
    task, _, asked = ready(llama, TEXTS, asked_of(llama, reserved=8))
    assert not task.packs
    assert any(name == "packing" and "first document alone" in why for name, _, why in asked.plan.entries)


def test_best_fit_fills_blocks_and_loses_nothing():
    lengths = [5, 3, 7, 2, 2, 1, 10]
    found = best_fit(lengths, 10)
    assert sorted(i for block in found for i in block) == list(range(7))
    assert [sum(lengths[i] for i in block) for block in found] == [10, 10, 10]


def test_the_first_token_of_a_piece_is_not_learned():
    assert list(pieces(([1, 2, 3, 4, 5], [IGNORED, 2, 3, 4, 5]), 3)) == [
        ([1, 2, 3], [IGNORED, 2, 3]),
        ([4, 5], [IGNORED, 5]),
    ]


def test_rows_whose_answer_is_cut_away_are_left_out_and_told(llama):
    rows = chats(("Hi", "Hello"), ("Hi " * 30, "Hello"))
    task, _, asked = ready(llama, rows, max_length=32)
    examples = task.encode(rows)
    assert (len(examples), examples.truncated) == (1, 1)
    assert ("left out", "50.0% of the training rows", "no answer begins within 32 tokens") in asked.plan.entries
    with pytest.raises(DataError, match="no row has an answer within 4 tokens"):
        ready(llama, rows, max_length=4)


def test_bad_rows_are_named_one_by_one_and_a_missing_column_once(llama):
    rows = chats(("Hi", "Hello"), ("", "Hello"))
    task, _, _ = ready(llama, TALK)
    assert task.check(rows) == {1: 'column "messages": message 1: the text is empty'}
    with pytest.raises(DataError, match='There is no column "messages"'):
        task.check(TEXTS)


def test_more_length_than_the_model_has_positions_is_refused(llama):
    for rows in (TEXTS, TALK):
        with pytest.raises(RecipeError, match=r"max_length is 200, and .* 128 positions"):
            ready(llama, rows, max_length=200)


def test_the_settings_are_checked():
    for wrong in ({"loss_on": "some"}, {"packing": "maybe"}, {"max_length": 1}):
        with pytest.raises(smidgen.core.errors.ConfigError):
            CausalLMSettings(**wrong)


def test_all_tokens_are_learned_where_that_is_said(llama):
    task, _, _ = ready(llama, TALK, loss_on="all")
    examples = task.encode(TALK)
    assert examples.targets.tolist() == [length - 1 for length in examples.lengths]


def test_the_metrics_are_those_of_the_sums(llama):
    task, _, _ = ready(llama, TALK)
    found = torch.tensor([[6.0, 3.0, 1.0], [2.0, 1.0, 1.0]])
    scores = task.score(found, torch.tensor([3, 1]))
    assert scores == pytest.approx({"perplexity": math.exp(2), "loss": 2.0, "token_accuracy": 0.5})
    assert not task.higher_is_better
    for metric in task.metrics:
        task.judge_by(metric)
        value = task.value_of(task.parts(found, torch.tensor([3, 1])).sum(0))
        assert float(value) == pytest.approx(scores[metric])


def test_a_model_whose_logits_are_made_otherwise_is_refused(llama):
    task = CausalLM.understand({"train": TALK}, CausalLMSettings(), asked_of(llama))
    model = task.build(asked_of(llama))
    model.body.lm_head.register_forward_hook(lambda module, args, out: out + args[0].sum(-1, keepdim=True).sin() * out)
    model.check()  # it is done within the layer
    body = model.body

    class Odd(type(body)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    body.__class__ = Odd
    with pytest.raises(ModelError, match="does something to the outputs of its output layer"):
        model.check()


def test_an_encoder_is_no_causal_language_model(tmp_path):
    from transformers import BertLMHeadModel

    tiny_bert(tmp_path)
    with pytest.raises(ModelError, match="has no weights for cls"):
        ready(tmp_path, TALK)
    BertLMHeadModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertLMHeadModel lets a token see those that come after it"):
        ready(tmp_path, TALK)


def test_chats_that_share_blocks_are_cut_and_not_torn(llama):
    rows = chats(("Hi", "Hello"), ("Ho", "Hello " * 40), ("He", "Hallo"))
    task, model, _ = ready(llama, rows, packing="on", max_length=64)
    examples = task.encode(rows)
    assert (len(examples), examples.truncated) == (2, 1)
    single, _, _ = ready(llama, rows, max_length=64)
    expected = answers(single, model, single.encode(rows), range(3)).sum(0)
    torch.testing.assert_close(answers(task, model, examples, range(2)).sum(0), expected, rtol=1e-4, atol=1e-3)


def test_rows_of_one_prompt_are_not_split(llama):
    rows = chats(("Hi", "Hello"), ("hi ", "Hey"), ("Ho", "Hello"))
    task, _, _ = ready(llama, rows)
    assert task.groups(rows) == [0, 0, 1]
    remarks = task.remarks(rows.select([0]), rows.select([0, 2]))
    assert remarks[0].startswith("1 of 2 test prompts stand in the training rows too")


def test_samples_are_what_generate_says(llama):
    task, model, _ = ready(llama, TALK)
    assert (task.prompt_of(TALK, 1), task.truth_of(TALK, 1)) == ("What is the colour of the sky?", "Blue")
    [said] = task.samples(model, TALK, [0])
    ids = torch.tensor(
        [
            task.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[
                "input_ids"
            ]
        ]
    )
    for _ in range(48):
        ids = torch.cat([ids, model.body(ids).logits[:, -1].argmax(1, keepdim=True)], dim=1)
        if ids[0, -1] == task.tokenizer.eos_token_id:
            break
    start = len(
        task.tokenizer(
            task.tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
            )
        )["input_ids"]
    )
    assert said == task.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    texts, model, _ = ready(llama, TEXTS)
    assert (texts.prompt_of(TEXTS, 2), texts.truth_of(TEXTS, 2)) == ("a longer one of what the user", "is")
    assert len(texts.samples(model, TEXTS, [2, 3])) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_prompt_longer_than_the_positions_the_last_tokens_are_read(folders, kind):
    rows = chats(("what " * 300 + "colour", "Blue"), ("Hi", "Hello"))
    task, model, _ = ready(folders[kind], rows, max_length=100)
    read = []
    model.body.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    assert len(task.samples(model, rows, [0])) == 1
    assert read[0].shape[1] == 128 - 48
    assert task.tokenizer.decode(read[0][0]).endswith("what colour<|im_end|>\n<|im_start|>assistant\n")
    task.max_length = 30
    task.samples(model, rows, [0])
    assert 30 in {ids.shape[1] for ids in read}
    smidgen.attach(model.body, smidgen.PromptTuning(length=20), seed=0)  # virtual tokens take positions too
    task.max_length, read[:] = 100, []
    task.samples(model, rows, [0])
    assert 128 - 48 - 20 in {ids.shape[1] for ids in read}


def test_a_model_with_few_positions_keeps_half_of_them_for_the_prompt():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=20)).eval()
    assert room(body, 48) == (10, 10)
    say(body, tokenizer_of(), list(range(3, 60)), 48)


def test_what_is_described_is_read_back_and_keeps_every_row(llama):
    rows = chats(("Hi", "Hello"), ("Hi " * 30, "Hello"))
    for some in (rows, TEXTS):
        task, model, asked = ready(llama, some, max_length=32)
        again = CausalLM.from_description(task.describe(), asked)
        assert again.describe() == task.describe()
        examples = again.encode(some)
        assert len(examples) == len(some)
        lines = again.predicted(some, answers(again, model, examples, range(len(some))))
        assert lines[0]["perplexity"] > 1
        assert lines[0]["prompt"]
    again = CausalLM.from_description(ready(llama, rows, max_length=32)[0].describe(), asked)
    assert "perplexity" not in again.predicted(rows, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))[1]
    with pytest.raises(KeyError):
        CausalLM.from_description({"task": "causal_lm"}, asked)
    with pytest.raises(ValueError, match="are not those of chat"):
        CausalLM.from_description({**task.describe(), "kind": "chat"}, asked)


def test_rows_of_another_file_may_have_other_names_and_another_shape(llama):
    task, _, asked = ready(llama, TALK)
    again = CausalLM.from_description(task.describe(), asked)
    again.rows_for(table(prompt=["Hi"], completion=["Hello"]), labelled=True)
    assert again.shape.kind == "completion"
    again.rows_for(TEXTS, labelled=True)
    assert again.shape.kind == "text"
    assert len(again.encode(TEXTS)) == len(TEXTS)
    with pytest.raises(DataError, match="smidgen chat"):
        CausalLM.from_description(task.describe(), asked).table_of(["Hi"])


def understood(folder, train, columns=None, **others):
    asked = asked_of(folder, columns=columns or {})
    given = {"train": train} | {name.replace("shift_", "shift:"): rows for name, rows in others.items()}
    task = CausalLM.understand(given, CausalLMSettings(max_length=64), asked)
    model = task.build(asked)
    task.settle(model, train, asked)
    return task, model.eval(), {name: value for name, value, _ in asked.plan.entries}


def test_each_table_is_read_by_its_own_shape(llama):
    texts, note = table(text=["what is the colour of hello"]), table(text=["colour"], note=["hello"])
    alpaca = table(instruction=["Say it"], input=["Hi"], output=["Hello"])
    task, model, plan = understood(llama, TALK, shift_texts=texts, shift_notes=note, test=alpaca)
    assert plan["rows of shift:texts"] == "plain texts (text)"
    assert plan["rows of test"] == "prompts and completions (instruction, output, input)"
    assert "rows of train" not in plan
    for rows in (TALK, texts, note, alpaca):
        assert task.check(rows) == {}
        alone, _, _ = understood(llama, rows)
        alone.packs = False
        assert task.encode(rows).inputs == alone.encode(rows).inputs
    assert task.encode(texts).targets.tolist() == [len(task.rows_of(texts).tokens(texts)[0][0]) - 1]
    assert task.prompt_of(alpaca, 0) == "Say it\n\nHi"
    assert task.truth_of(alpaca, 0) == "Hello"
    assert len(task.samples(model, alpaca, [0])) == 1
    assert task.shape.kind == "chat"
    assert {"messages", "text", "instruction", "input", "output"} == set(task.encoding().columns)


def test_a_further_column_of_the_prompt_is_not_dropped_beside_rows_without_it(llama):
    short, long = table(instruction=["a"], output=["b"]), table(instruction=["a"], input=["c"], output=["b"])
    task, _, _ = understood(llama, short, shift_more=long)
    assert task.prompt_of(long, 0) == "a\n\nc"
    said, _, plan = understood(llama, short, {"prompt": "instruction", "completion": "output"}, shift_more=long)
    assert said.prompt_of(long, 0) == "a"  # what is said stands where the table has it
    assert "rows of shift:more" not in plan


def test_columns_that_are_said_are_those_of_tables_that_have_them(llama):
    train, other = table(body=["hello what"], text=["no"]), table(messages=TALK.column("messages"))
    task, _, plan = understood(llama, train, {"text": "body"}, valid=table(body=["hello"], more=["x"]), shift_x=other)
    assert task.rows_of(other).shape.kind == "chat"
    assert task.rows_of(train).shape.columns == {"text": "body"}
    assert [name for name in plan if name.startswith("rows of")] == ["rows of shift:x"]
    assert plan["chat template"] == "the model's own"


def test_chats_beside_packed_texts_are_judged_by_their_answers(llama):
    task, model, _ = understood(llama, TEXTS, shift_talk=TALK)
    assert task.packs
    alone, _, _ = understood(llama, TALK)
    sums = [answers(each, model, found := each.encode(TALK), range(len(found))).sum(0) for each in (task, alone)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-3)


def test_a_table_of_no_clear_shape_is_named(llama):
    with pytest.raises(DataError, match=r'shift:x: It is not clear.*as in the training rows: "messages"'):
        understood(llama, TALK, shift_x=table(a=["x"], b=["y"]))


def test_a_batch_with_nothing_to_learn_has_no_loss_and_a_gradient_of_zero(llama):
    task, model, _ = ready(llama, TALK)
    batch = task.collate(task.encode(TALK), [0])
    batch["targets"][:] = IGNORED
    adapters = smidgen.attach(model.body, smidgen.LoRA(rank=2, targets="*.q_proj"), seed=0)
    loss, count = task.loss(model(batch), batch)
    assert (loss.item(), count) == (0.0, 0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, adapters.parameters()))
