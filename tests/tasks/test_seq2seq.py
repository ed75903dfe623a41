"""Sequence to sequence: the loss against transformers' own for several families, rows, writing, ROUGE-L."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import smidgen
from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError, RecipeError
from smidgen.data.table import Table
from smidgen.tasks.base import Asked
from smidgen.tasks.language.seq2seq_model import Seq2SeqModel
from smidgen.tasks.language.token_rows import IGNORED
from smidgen.tasks.language.writing import rouge_l
from smidgen.tasks.models import locate
from smidgen.tasks.seq2seq import Seq2Seq, Seq2SeqSettings

WORDS = [
    *("the", "a", "cat", "dog", "ran", "sat", "on", "mat", "red", "blue", "big", "small", "hat"),
    *("le", "un", "chat", "chien", "rouge", "summarize", ":"),
]
VOCABULARY = 3 + len(WORDS)
FAMILIES = ("t5", "t5_untied", "bart", "mbart", "marian", "m2m_100", "t5gemma")


def tokenizer() -> Any:
    """Words as tokens, with </s> at the end of each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, model_input_names=inputs, **names)


def model_of(family: str) -> Any:
    import transformers as T

    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    bart: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    bart |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    bart |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
    bart |= {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 32, "init_std": 0.3, **ends}
    bart |= {"bos_token_id": None, "forced_eos_token_id": None}
    t5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, **ends}
    if family == "t5":
        return T.T5ForConditionalGeneration(T.T5Config(**t5))
    if family == "t5_untied":
        return T.T5ForConditionalGeneration(T.T5Config(**t5, tie_word_embeddings=False))
    if family == "t5gemma":
        half: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
        half |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        half |= {"final_logit_softcapping": 0.5, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        config = T.T5GemmaConfig(encoder=half, decoder=half, vocab_size=VOCABULARY)
        return T.T5GemmaForConditionalGeneration(config)
    kind = {"bart": "Bart", "mbart": "MBart", "marian": "Marian", "m2m_100": "M2M100"}[family]
    name = "MarianMTModel" if family == "marian" else f"{kind}ForConditionalGeneration"
    model = getattr(T, name)(getattr(T, f"{kind}Config")(**bart))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for family in FAMILIES:
            made[family] = tmp_path_factory.mktemp(family)
            model_of(family).save_pretrained(made[family])
            tokenizer().save_pretrained(made[family])
    return made


def asked_of(folder: Path, **settings: Any) -> Asked:
    return Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0, **settings)


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table(columns, [f"rows.jsonl:{i + 1}" for i in range(count)])


ROWS = table(
    source=["the cat sat on the mat", "a dog ran", "the big red hat", "the small dog sat on a big blue mat"],
    target=["le chat", "un chien", "le chat rouge : le hat", "chien"],
)


def ready(folder: Path, rows: Table = ROWS, asked: Asked | None = None, **settings: Any):
    asked = asked or asked_of(folder)
    task = Seq2Seq.understand({"train": rows}, Seq2SeqSettings(**settings), asked)
    model = task.build(asked)
    task.settle(model, rows, asked)
    return task, model.eval(), asked


def batch_of(task: Seq2Seq, rows: Table = ROWS) -> dict[str, torch.Tensor]:
    return task.collate(task.encode(rows), range(len(rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(folders, family):
    task, model, _ = ready(folders[family])
    batch = batch_of(task)
    own = model.body(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"], use_cache=False
    )
    loss, count = task.loss(model(batch), batch)
    assert count == int((batch["targets"] != IGNORED).sum())
    torch.testing.assert_close(loss / count, own.loss, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.body.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(own.loss, trained, allow_unused=True)
    ours = torch.autograd.grad(loss / count, trained, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    right = (own.logits.argmax(2) == batch["targets"]).sum(1)
    assert torch.equal(model(batch)["right"], right)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("where", ["auto", "lm_head"])
def test_adapters_act_in_the_loss_also_on_the_output_layer(folders, family, where):
    task, model, _ = ready(folders[family])
    batch = batch_of(task)
    smidgen.attach(model.body, smidgen.LoRA(rank=2, targets=where), seed=0)
    for name, p in model.body.named_parameters():
        if p.requires_grad and "B" in name.split("."):
            torch.nn.init.normal_(p)
    own = model.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"])
    loss, count = task.loss(model(batch), batch)
    torch.testing.assert_close(loss / count, own.loss, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.body.parameters() if p.requires_grad]
    assert trained
    grads = [torch.autograd.grad(mean, trained) for mean in (loss / count, own.loss)]
    ours, theirs = (torch.cat([grad.flatten() for grad in some]) for some in grads)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_logits_of_all_targets_are_never_there(folders):
    task, model, _ = ready(folders["bart"])
    shapes: list[tuple[int, ...]] = []
    layer = model.body.get_output_embeddings()
    layer.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    targets = batch_of(task)["targets"]
    with torch.no_grad():
        model.hidden(batch_of(task))
    assert shapes == [(len(targets), 0, VOCABULARY)]


def test_a_row_costs_the_same_alone_and_beside_longer_ones(folders):
    for family in ("t5", "bart"):
        task, model, _ = ready(folders[family])
        examples = task.encode(ROWS)
        with torch.no_grad():
            together = task.answer(model(whole := task.collate(examples, range(4))), whole)
            rows = [task.collate(examples, [i]) for i in range(4)]
            alone = torch.cat([task.answer(model(row), row) for row in rows])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_all_tokens(folders):
    task, model, _ = ready(folders["t5"])
    batch = batch_of(task)
    with torch.no_grad():
        answers = task.answer(model(batch), batch)
        own = model.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"])
    figures = task.score(answers, task.encode(ROWS).targets)
    known = batch["targets"] != IGNORED
    right = (own.logits.argmax(2) == batch["targets"])[known].double().mean()
    assert figures["perplexity"] == pytest.approx(math.exp(own.loss), rel=1e-5)
    assert figures["loss"] == pytest.approx(float(own.loss), rel=1e-5)
    assert figures["token_accuracy"] == pytest.approx(float(right))
    assert task.metrics == ("perplexity", "loss", "token_accuracy")
    assert not task.higher_is_better
    sums = task.parts(answers, batch["targets"]).double().sum(0)
    assert float(task.value_of(sums)) == pytest.approx(figures["perplexity"])
    with pytest.raises(RecipeError, match="rouge_l"):
        ready(folders["t5"], asked=asked_of(folders["t5"], metric="bleu"))


def test_rouge_is_measured_on_what_the_model_writes_where_it_is_asked_for(folders):
    task, model, asked = ready(folders["bart"], asked=asked_of(folders["bart"], metric="rouge_l"), max_target_length=6)
    batch = batch_of(task)
    with torch.no_grad():
        answers = task.answer(model(batch), batch)
    said = task.samples(model, ROWS, range(4))
    expected = [rouge_l(*pair) for pair in zip(said, ROWS.column("target"), strict=True)]
    assert answers.shape == (4, 3 + 7)
    assert answers[:, -1].tolist() == pytest.approx(expected)
    figures = task.score(answers, batch["targets"])
    assert figures["rouge_l"] == pytest.approx(sum(expected) / 4)
    assert float(task.value_of(task.parts(answers, batch["targets"]).sum(0))) == pytest.approx(figures["rouge_l"])
    assert task.higher_is_better
    assert "said" not in model.train()(batch)  # nothing is written while training
    assert "said" not in model.eval()(batch)  # nor where a gradient is asked for
    again = Seq2Seq.from_description(task.describe(), asked)
    assert again.build(asked).says == 6


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_model_that_learned_the_rows_writes_them_and_ignores_its_beams(folders, family):
    task, model, _ = ready(folders[family])
    model.body.generation_config.num_beams = 4
    model.body.generation_config.min_length = 9
    model.body.generation_config.no_repeat_ngram_size = 1
    batch = batch_of(task)
    optimizer = torch.optim.Adam(model.body.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss, count = task.loss(model(batch), batch)
        (loss / count).backward()
        optimizer.step()
    assert loss.detach() / count < 0.1
    assert task.samples(model, ROWS, [2, 0]) == ["le chat rouge : le hat", "le chat"]
    first = task.predicted(ROWS, task.answer(model(batch), batch).detach())[0]
    assert first["source"] == "the cat sat on the mat"
    assert first["tokens"] == 3
    assert 1 <= first["perplexity"] < 1.2


def test_the_prefix_stands_before_each_source_and_rows_are_cut_with_their_end(folders):
    task, _, asked = ready(folders["t5"], prefix="summarize : ", max_length=5, max_target_length=3)
    examples = task.encode(ROWS)
    read = task.tokenizer.convert_ids_to_tokens(examples.inputs[0]["input_ids"])
    assert read == ["summarize", ":", "the", "cat", "</s>"]
    written = task.tokenizer.convert_ids_to_tokens(examples.inputs[2]["targets"])
    assert written == ["le", "chat", "</s>"]
    assert examples.truncated == 4
    assert examples.targets.tolist() == [3, 3, 3, 2]
    assert asked.plan.entries[-1][0] == "max_target_length"
    with pytest.raises(RecipeError, match=r"max_target_length is 33, and .* has 32 positions"):
        ready(folders["bart"], max_target_length=33)


@pytest.mark.parametrize(
    ("columns", "said", "expected"),
    [
        (("article", "highlights", "id"), {}, ("article", "highlights")),
        (("summary", "document"), {}, ("document", "summary")),
        (("english", "french"), {}, ("english", "french")),
        (("english", "french"), {"source": "french"}, ("french", "english")),
        (("a", "b", "c"), {"source": "c", "target": "a"}, ("c", "a")),
        (("input", "output", "note"), {"target": "note"}, ("input", "note")),
    ],
    ids=str,
)
def test_columns_are_found_by_their_names_or_as_said(folders, columns, said, expected):
    rows = table(**{name: ["the cat", "a dog"] for name in columns})
    task = Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"], columns=said))
    assert task.columns.columns == dict(zip(("source", "target"), expected, strict=True))


def test_columns_that_are_not_clear_are_asked_for(folders):
    rows = table(a=["x"], b=["y"], c=["z"])
    with pytest.raises(DataError, match=r"--column source=NAME --column target=NAME.*a, b, c"):
        Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"]))
    with pytest.raises(DataError, match='no column "d"'):
        Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"], columns={"source": "d"}))
    asked = asked_of(folders["t5"], columns={"source": "a", "target": "a"})
    with pytest.raises(DataError, match="not clear"):
        Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked)


def test_translations_become_two_columns(folders, tmp_path):
    file = tmp_path / "train.jsonl"
    lines = [
        '{"id": 1, "translation": {"en": "the cat", "fr": "le chat"}}\n',
        '{"id": 2, "translation": {"en": "a"}}\n',
    ]
    file.write_text("".join([lines[0], lines[0].replace("cat", "dog")]))
    parts, problems = Seq2Seq.read(str(file), Seq2SeqSettings())
    assert not problems
    assert parts["train"].names == ["id", "translation.en", "translation.fr"]
    task = Seq2Seq.understand(parts, Seq2SeqSettings(), asked_of(folders["t5"]))
    assert task.columns.columns == {"source": "translation.en", "target": "translation.fr"}
    back = asked_of(folders["t5"], columns={"source": "translation.fr"})
    assert Seq2Seq.understand(parts, Seq2SeqSettings(), back).columns.columns["target"] == "translation.en"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("rows", "columns", "sources", "targets"),
    [
        (
            {"instruction": ["a cat", "a dog"], "input": ["red", ""], "output": ["un chat", "un chien"]},
            {"source": "instruction", "input": "input", "target": "output"},
            ["a cat\n\nred", "a dog"],
            ["un chat", "un chien"],
        ),
        (
            {"id": ["1"], "question": ["the cat"], "answer": ["le chat"]},
            {"source": "question", "target": "answer"},
            ["the cat"],
            ["le chat"],
        ),
        (
            {"id": ["1"], "response": ["le chat"], "prompt": ["the cat"]},
            {"source": "prompt", "target": "response"},
            ["the cat"],
            ["le chat"],
        ),
        (
            {"id": ["1"], "messages": [[said("user", "the cat"), said("assistant", "le chat")]]},
            {"messages": "messages"},
            ["the cat"],
            ["le chat"],
        ),
        (
            {
                "conversations": [
                    [
                        {"from": "human", "value": "the cat"},
                        {"from": "gpt", "value": "le chat"},
                        {"from": "human", "value": "a dog"},
                        {"from": "gpt", "value": "un chien"},
                        {"from": "human", "value": "red"},
                    ]
                ]
            },
            {"messages": "conversations"},
            ["user: the cat\nassistant: le chat\nuser: a dog"],
            ["un chien"],
        ),
    ],
    ids=["alpaca", "question and answer", "prompt and response", "messages", "sharegpt"],
)
def test_what_a_language_model_learns_from_is_read_as_sources_and_targets(folders, rows, columns, sources, targets):
    rows = table(**rows)
    task, model, asked = ready(folders["t5"], rows)
    assert task.columns.columns == columns
    assert task.check(rows) == {}
    assert list(task.columns.sources(rows)) == sources
    assert list(task.columns.targets(rows)) == targets
    pairs = task.tokens.of(sources, targets)
    found = task.encode(rows).inputs
    assert ([row["input_ids"] for row in found], [row["targets"] for row in found]) == pairs
    assert {f"{role} column" for role in columns} <= {name for name, _, _ in asked.plan.entries}
    again = Seq2Seq.from_description(task.describe(), asked)
    assert again.columns.columns == task.resolved_columns() == columns
    given = again.table_of(["the cat", "a dog"])
    again.rows_for(given, labelled=False)
    assert again.check(given) == {}
    assert list(again.columns.sources(given)) == ["the cat", "a dog"]
    assert [row["targets"] for row in again.encode(given).inputs] == [[IGNORED]] * 2
    assert len(again.samples(model, given, [0, 1])) == 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"source": "instruction", "target": "output"}, {"source": "instruction", "target": "output"}),
        ({"source": "input"}, {"source": "input", "target": "output"}),
        ({"target": "note"}, {"source": "instruction", "input": "input", "target": "note"}),
        ({"input": "note"}, {"source": "instruction", "input": "note", "target": "output"}),
        ({"messages": "talk"}, {"messages": "talk"}),
    ],
    ids=str,
)
def test_columns_that_are_said_win_over_what_is_recognised(folders, columns, expected):
    rows = {name: ["the cat"] for name in ("instruction", "input", "output", "note")}
    rows = table(**rows, talk=[[said("user", "Hi"), said("model", "a cat")]])
    if "messages" not in columns:
        rows = table(**{name: values for name, values in rows.columns.items() if name != "talk"})
    task = Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"], columns=columns))
    assert task.columns.columns == expected


def test_chats_that_ask_nothing_or_have_no_answer_are_named(folders):
    talks = [[said("user", "Hi"), said("assistant", "a cat")], [said("assistant", "a dog")], [said("user", "Ho")], "Hi"]
    rows = table(messages=talks)
    task = Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"]))
    assert task.check(rows) == {
        1: 'column "messages": nothing stands before the last answer',
        2: 'column "messages": there is no message of the assistant, so nothing to learn',
        3: "column \"messages\": not a list of messages but 'Hi'",
    }
    task.rows_for(rows, labelled=False)
    assert sorted(task.check(rows)) == [1, 3]
    assert task.columns.sources(rows)[2] == "Ho"
    with pytest.raises(ValueError, match="are not those of sources and targets"):
        Seq2Seq.from_description({**task.describe(), "columns": {"source": "a"}}, asked_of(folders["t5"]))


def test_rows_without_a_text_are_named(folders):
    rows = table(source=["the cat", "", "a dog"], target=["le chat", "un", None])
    task = Seq2Seq.understand({"train": rows}, Seq2SeqSettings(), asked_of(folders["t5"]))
    assert task.check(rows) == {1: 'column "source": the text is empty', 2: 'column "target": the text is missing'}


def test_equal_sources_stay_together_and_are_told(folders):
    task, _, _ = ready(folders["t5"])
    groups = task.groups(table(source=["a dog", "the cat", "a dog"], target=["x", "y", "z"]))
    assert groups[0] == groups[2] != groups[1]
    assert task.remarks(ROWS, ROWS)[0].startswith("4 of 4 test sources stand in the training rows too")


def test_a_saved_task_is_used_again_also_without_targets(folders):
    task, model, asked = ready(folders["t5"], prefix="summarize : ")
    again = Seq2Seq.from_description(task.describe(), asked)
    assert again.describe() == task.describe()
    examples = again.encode(ROWS)
    assert [row["input_ids"] for row in examples.inputs] == [row["input_ids"] for row in task.encode(ROWS).inputs]
    rows = again.table_of(["the cat", "a big dog"])
    again.rows_for(rows, labelled=False)
    assert again.check(rows) == {}
    with torch.no_grad():
        batch = again.collate(again.encode(rows), [0, 1])
        answers = again.answer(model(batch), batch)
    assert answers.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert again.predicted(rows, answers)[1] == {"source": "a big dog"}
    assert len(again.samples(model, rows, [0, 1])) == 2
    other = table(document=["the cat"], summary=["le chat"])
    again.rows_for(other, labelled=True)
    assert again.columns.columns == {"source": "document", "target": "summary"}
    with pytest.raises(KeyError):
        Seq2Seq.from_description({"task": "seq2seq"}, asked)


def test_a_merged_model_is_saved_with_its_tokenizer_and_the_recipe_says_what_was_chosen(folders, tmp_path):
    task, model, _ = ready(folders["bart"])
    task.save_body(model.body, str(tmp_path))
    again, copy, _ = ready(tmp_path)
    batch = batch_of(again)
    with torch.no_grad():
        assert torch.equal(copy(batch)["loss"], model(batch_of(task))["loss"])
    assert again.resolved_settings() == {"max_length": 16, "max_target_length": 16}
    assert again.resolved_columns() == {"source": "source", "target": "target"}
    assert (again.prompt_of(ROWS, 1), again.truth_of(ROWS, 1)) == ("a dog ran", "un chien")


def test_a_model_whose_logits_are_made_otherwise_is_refused(folders):
    class Louder(torch.nn.Module):
        def __init__(self, body: Any) -> None:
            super().__init__()
            self.body, self.config = body, body.config

        def get_output_embeddings(self) -> Any:
            return self.body.get_output_embeddings()

        def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, labels=None, use_cache=None):
            if decoder_input_ids is None:
                decoder_input_ids = self.body.prepare_decoder_input_ids_from_labels(labels)
            out = self.body(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)
            out.logits = 2 * out.logits
            return out

    task, model, _ = ready(folders["t5"])
    with pytest.raises(ModelError, match="Louder does something between its decoder and its logits"):
        Seq2SeqModel(Louder(model.body)).check_logits(batch_of(task))


def test_models_and_tokenizers_of_another_kind_are_refused(folders, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ModelError, match="LlamaForCausalLM is no encoder-decoder that writes text"):
        Seq2SeqModel(LlamaForCausalLM(small))


LANGUAGES = {"NllbTokenizer": ("eng_Latn", "fra_Latn"), "MBart50Tokenizer": ("en_XX", "fr_XX")} | {
    "MBartTokenizer": ("en_XX", "fr_XX")
}


def of_languages(kind: str, folder: Path) -> Any:
    """A tokenizer of many languages with our few words, in a folder with a model of its size."""
    import transformers as T

    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -float(i)) for i, word in enumerate(WORDS)]
    vocabulary = [*special, *words, *((language, 0.0) for language in LANGUAGES[kind]), ("<mask>", 0.0)]
    if kind == "NllbTokenizer":  # of pairs, merged
        made = T.NllbTokenizer(vocab={word: i for i, (word, _) in enumerate(vocabulary)}, merges=[])
    else:
        made = getattr(T, kind)(vocab=vocabulary)
    made.save_pretrained(folder)
    bart: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    bart |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    bart |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
    bart |= {"vocab_size": len(made), "d_model": 16, "max_position_embeddings": 32, "init_std": 0.3}
    bart |= {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    family = "M2M100" if kind == "NllbTokenizer" else "MBart"
    model = getattr(T, f"{family}ForConditionalGeneration")(getattr(T, f"{family}Config")(**bart))
    model.save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", LANGUAGES)
def test_a_tokenizer_of_many_languages_marks_them_and_the_model_writes_in_the_target(kind, tmp_path):
    source, target = LANGUAGES[kind]
    made = of_languages(kind, tmp_path)
    task, model, asked = ready(tmp_path, source_language=source, target_language=target)
    batch = batch_of(task, ROWS.select([0]))
    mark, other = (made.convert_tokens_to_ids(language) for language in (target, source))
    assert mark in batch["targets"][0]
    assert other in batch["input_ids"][0]
    with torch.no_grad():
        own = model.body(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
        ).loss
        loss, count = task.loss(model(batch), batch)
    torch.testing.assert_close(loss / count, own)
    written = model.say(batch, 4)[0].tolist()
    learned = [*model.decoder_inputs(batch["targets"])[0].tolist(), *batch["targets"][0, -1:].tolist()]
    place = learned.index(mark)  # the start itself, or the first after it
    assert written[: place + 1] == learned[: place + 1]
    again = Seq2Seq.from_description(task.describe(), asked)
    assert [*again.build(asked).begins.values()] == [mark]
    assert batch_of(again, ROWS.select([0]))["targets"].tolist() == batch["targets"].tolist()


def test_languages_are_asked_for_by_their_names_and_refused_where_there_are_none(folders, tmp_path):
    of_languages("MBart50Tokenizer", tmp_path)
    with pytest.raises(RecipeError, match=r"MBart50Tokenizer wants to be told languages: say task\.source_language"):
        ready(tmp_path)
    with pytest.raises(RecipeError, match=r'task\.target_language: MBart50Tokenizer does not know "fr"'):
        ready(tmp_path, source_language="en_XX", target_language="fr")
    with pytest.raises(RecipeError, match=r"knows no languages: leave out task\.source_language"):
        ready(folders["t5"], source_language="en_XX")


def test_settings_that_cannot_be_are_refused():
    from smidgen.core.errors import ConfigError

    with pytest.raises(ConfigError, match="max_target_length"):
        Seq2SeqSettings(max_target_length=0)


def test_errors_and_right_rows_are_counted_over_what_was_written(folders):
    task, model, _ = ready(folders["t5"], asked=asked_of(folders["t5"], metric="cer"), written=2)
    assert task.metrics[3:] == ("exact_match", "cer", "wer", "rouge_l")
    assert not task.higher_is_better
    batch = batch_of(task)
    assert batch["written"].tolist() == [True, False, True, False]  # two of four, evenly spread
    with torch.no_grad():
        outputs = model(batch)
    assert len(outputs["said"]) == 2
    truth = batch["targets"][[0, 2]]
    outputs["said"] = truth.masked_fill(truth == IGNORED, task.tokenizer.pad_token_id)
    outputs["said"][1, 0] = task.tokenizer.convert_tokens_to_ids("un")  # un chat rouge : le hat
    answers = task.answer(outputs, batch)
    figures = task.score(answers, batch["targets"])
    characters = len("le chat") + len("le chat rouge : le hat")
    assert figures["exact_match"] == 0.5
    assert figures["cer"] == pytest.approx(2 / characters)
    assert figures["wer"] == pytest.approx(1 / (2 + 6))
    for metric in ("exact_match", "cer", "wer", "rouge_l"):
        task.metric = metric
        assert float(task.value_of(task.parts(answers, batch["targets"]).sum(0))) == pytest.approx(figures[metric])
    with torch.no_grad():
        outputs = model({**batch, "written": torch.zeros(4, dtype=torch.bool)})
    assert "said" not in outputs
    assert task.answer(outputs, {**batch, "written": torch.zeros(4, dtype=torch.bool)})[:, 3:].abs().sum() == 0


def test_a_task_whose_metric_needs_no_writing_writes_to_no_row(folders):
    task, model, _ = ready(folders["t5"])
    batch = batch_of(task)
    assert not batch["written"].any()
    assert "said" not in model(batch)
