"""Token classification: words meet their sub-words, rows are checked, and what is cut off counts as wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError
from smidgen.data.table import Table
from smidgen.tasks.base import Asked
from smidgen.tasks.models import locate
from smidgen.tasks.text.classifiers import TokenClassifier
from smidgen.tasks.text.spans import NO_TAG
from smidgen.tasks.token_classification import TokenClassification, TokenClassificationSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_bert, tiny_llama

# "good" and "film" are one sub-word, "plots" is "plot" and "##s"
WORDS = [["good", "film"], ["the", "plots", "of", "film"], ["film", "good", "good"]]
TAGS = [["B-A", "O"], ["O", "B-B", "I-B", "I-B"], ["O", "B-A", "I-A"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def asked_for(folder, **said):
    return Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0, **said)


def table(words=WORDS, tags=TAGS, **more):
    columns = {"tokens": words, **({"ner_tags": tags} if tags is not None else {}), **more}
    return Table(columns, [f"t.jsonl:{i + 1}" for i in range(len(words))])


def task_of(folder, rows=None, max_length=16, columns=None, **settings):
    made = TokenClassification.understand(
        {"train": rows or table()}, TokenClassificationSettings(**settings), asked_for(folder, columns=columns or {})
    )
    made.max_length = max_length
    return made


def batch_of(task, rows, indices=None):
    examples = task.encode(rows)
    return examples, task.collate(examples, indices or range(len(rows)))


def test_each_word_has_its_tag_on_its_first_sub_word(folder):
    task = task_of(folder)
    examples, batch = batch_of(task, table())
    assert task.tags.names == ("O", "B-A", "I-A", "B-B", "I-B")
    assert examples.lengths == [4, 7, 5]  # with [CLS] and [SEP]; "plots" has two
    assert batch["firsts"].tolist()[1] == [1, 2, 4, 5, -1, -1, -1]
    assert batch["words"].tolist()[1] == [0, 1, 2, 3, -1, -1, -1]
    assert batch["targets"].tolist()[1] == [0, 3, 4, 4, *[NO_TAG] * 3]
    assert task.feature_targets(batch).tolist() == [1, 0, 0, 3, 4, 4, 0, 1, 2]
    assert examples.targets.tolist()[0] == [1, 0, NO_TAG, NO_TAG]


def test_features_and_answers_are_in_the_order_of_the_words(folder):
    task = task_of(folder)
    model = task.build(asked_for(folder)).eval()
    examples, batch = batch_of(task, table())
    with torch.no_grad():
        outputs = model(batch)
        out = model.body(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        states = torch.cat([out.hidden_states[1], out.last_hidden_state], dim=-1)
    assert outputs.shape == (9, 5)
    torch.testing.assert_close(model.features(batch)[4], states[1, 4])  # "of"
    answers = task.answer(outputs, batch)
    assert answers.shape == (3, 16)
    assert answers[1, :4].tolist() == outputs[2:6].argmax(1).tolist()
    assert (answers[1, 4:] == NO_TAG).all()
    perfect = F.one_hot(task.feature_targets(batch), 5).float()
    assert task.score(task.answer(perfect, batch), examples.targets)["f1"] == 1.0


def test_the_loss_is_a_sum_over_words_and_takes_the_probes_lines_too(folder):
    task = task_of(folder)
    _, batch = batch_of(task, table())
    outputs = torch.randn(9, 5)
    loss, count = task.loss(outputs, batch)
    assert count == 9
    targets = task.feature_targets(batch)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, targets, reduction="sum"))
    assert task.loss(outputs, {"targets": targets}) == (loss, 9)


def test_words_that_are_cut_off_count_as_missed(folder):
    task = task_of(folder, max_length=6)
    rows = table([["film"] * 10], [[*["O"] * 3, "B-A", *["O"] * 5, "B-A"]])
    examples, batch = batch_of(task, rows)
    assert examples.truncated == 1
    assert examples.targets.shape == (1, 10)
    perfect = task.answer(F.one_hot(task.feature_targets(batch), 5).float(), batch)
    scores = task.score(perfect, examples.targets)
    assert (scores["precision"], scores["recall"]) == (1.0, 0.5)


def test_words_that_the_tokenizer_drops_have_no_tag_and_break_nothing(folder):
    from tokenizers import normalizers

    task = task_of(folder)
    task.tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()  # drops what cannot be seen
    rows = table([["good", *["\u200b"] * 30, "film"]], [["B-A", *["O"] * 31]])
    _, batch = batch_of(task, rows)
    assert batch["words"].tolist() == [[0, -1, -1, -1]]
    assert task.feature_targets(batch).tolist() == [1]


def test_parts_add_up_to_every_metric(folder):
    rows = table()
    for settings, name in (({}, "f1"), ({}, "macro_f1"), ({"scheme": "plain"}, "accuracy")):
        task = TokenClassification.understand(
            {"train": rows}, TokenClassificationSettings(**settings), asked_for(folder, metric=name)
        )
        task.max_length = 16
        targets = task.encode(rows).targets
        answers = torch.where(torch.rand(targets.shape) < 0.5, targets, 1)
        parts = task.parts(answers, targets)
        assert parts.shape[0] == 3
        assert float(task.value_of(parts.sum(0))) == task.score(answers, targets)[name]
        draws = torch.stack([parts, parts.flip(0)]).sum(1)
        assert task.value_of(draws).shape == (2,)


def test_the_score_names_each_type_that_is_there(folder):
    task = task_of(folder)
    examples = task.encode(table())
    by_type = [f"{name} {kind}" for kind in "AB" for name in ("precision", "recall", "f1")]
    assert list(task.score(examples.targets, examples.targets)) == [*task.metrics, *by_type]
    some = task.encode(table(WORDS[:1], TAGS[:1]))
    assert not any(name.endswith(" B") for name in task.score(some.targets, some.targets))


def test_bad_rows_are_named_with_word_and_reason(folder):
    task = task_of(folder)
    bad = [
        (["good"], ["O", "O"], "1 words, but 2 tags"),
        ("good", ["O"], "not a list of words but 'good'"),
        (["good"], "O", "not a list of tags but 'O'"),
        (["good", ""], ["O", "O"], "word 2 (''): the text is empty"),
        (["good"], ["B-X"], "word 1 ('good'): \"B-X\" is not a tag of the training rows"),
        (["good", "film"], ["O", "I-A"], 'word 2 (\'film\'): "I-A" after "O": in iob2 an entity starts with B-'),
        ([], [], "not a list of words but []"),
    ]
    problems = task.check(table([*WORDS, *[words for words, _, _ in bad]], [*TAGS, *[tags for _, tags, _ in bad]]))
    assert sorted(problems) == [*range(3, 10)]
    for i, (_, _, what) in enumerate(bad, start=3):
        assert what in problems[i]


def test_a_bad_transition_is_named_with_file_and_line(folder, tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("good B-A\nfilm O\n\nthe O\nplot O\nend I-A\n")
    tables, problems = TokenClassification.read(str(path), TokenClassificationSettings())
    assert problems == []
    found = task_of(folder, tables["train"]).check(tables["train"])
    assert tables["train"].where(1) == "train.conll:4"
    assert found == {1: 'line 6 (\'end\'): "I-A" after "O": in iob2 an entity starts with B-'}


def test_json_lines_and_columns_give_the_same_rows(folder, tmp_path):
    conll, lines = tmp_path / "t.conll", tmp_path / "t.jsonl"
    rows = [list(zip(words, tags, strict=True)) for words, tags in zip(WORDS, TAGS, strict=True)]
    conll.write_text("\n".join("".join(f"{word} {tag}\n" for word, tag in row) for row in rows))
    lines.write_text("".join(json.dumps({"words": w, "tags": t}) + "\n" for w, t in zip(WORDS, TAGS, strict=True)))
    encoded = []
    for path in (conll, lines):
        tables, _ = TokenClassification.read(str(path), TokenClassificationSettings())
        encoded.append(task_of(folder, tables["train"]).encode(tables["train"]))
    assert encoded[0].inputs == encoded[1].inputs
    assert torch.equal(encoded[0].targets, encoded[1].targets)


def test_another_column_is_said_by_its_role(folder, tmp_path):
    path = tmp_path / "t.conll"
    path.write_text("1 good JJ B-A\n2 film NN O\n")
    tables, _ = TokenClassification.read(str(path), TokenClassificationSettings())
    task = task_of(folder, tables["train"], columns={"tokens": "column_2", "tags": "column_3"})
    assert task.tags.names == ("JJ", "NN")
    assert task.metrics == ("accuracy", "macro_f1")
    with pytest.raises(DataError, match='no column "colum_3"\\. Did you mean "column_3"'):
        task_of(folder, tables["train"], columns={"tags": "colum_3"})


def test_two_columns_of_tags_are_not_guessed_between(folder):
    with pytest.raises(DataError, match=r"tags is not clear: it could be ner_tags or labels.*--column tags=NAME"):
        task_of(folder, table(labels=TAGS))
    with pytest.raises(DataError, match=r"tokens is not clear: it has no usual name"):
        task_of(folder, Table({"x": WORDS, "tags": TAGS}, ["a", "b", "c"]))


def test_numbers_need_the_names_of_the_tags(folder):
    numbers = table(tags=[[1, 0], [0, 3, 4, 4], [0, 1, 2]])
    with pytest.raises(DataError, match=r'"ner_tags" are numbers \(to 4\).*task\.tag_names'):
        task_of(folder, numbers)
    task = task_of(folder, numbers, tag_names=("O", "B-A", "I-A", "B-B", "I-B"))
    assert torch.equal(task.encode(numbers).targets, task_of(folder).encode(table()).targets)
    assert "not a list of tags" in task.check(table(WORDS[:1], [[1, 9]]))[0]


def test_documents_stay_whole_and_equal_sentences_stay_together(folder):
    words, tags = [["good", str(i // 2)] for i in range(40)], [["B-A", "O"]] * 40
    rows = table(words, tags)
    train, held = task_of(folder, rows).hold_out(rows, 0.2, seed=0)
    assert not {str(words[i]) for i in train} & {str(words[i]) for i in held}
    rows = table(words, tags, document=[str(i % 5) for i in range(40)])
    train, held = task_of(folder, rows).hold_out(rows, 0.2, seed=0)
    assert {i % 5 for i in train}.isdisjoint({i % 5 for i in held})


def test_what_is_described_is_read_back_and_predicts(folder):
    task = task_of(folder)
    again = TokenClassification.from_description(json.loads(json.dumps(task.describe())), asked_for(folder))
    assert again.describe() == task.describe()
    rows = again.table_of(["good film, the U.N. plot's end."])
    assert rows.column("tokens") == [["good", "film", ",", "the", "U.N.", "plot's", "end", "."]]
    examples, batch = batch_of(again, rows)
    assert (examples.targets == NO_TAG).all()
    said = F.one_hot(torch.tensor([1, 2, 0, 3, 0, 0, 0, 0]), 5).float()
    (line,) = again.predicted(rows, again.answer(said, batch))
    assert line["entities"] == [
        {"type": "A", "words": ["good", "film"], "start": 0, "end": 2},
        {"type": "B", "words": ["the"], "start": 3, "end": 4},
    ]
    with pytest.raises(ValueError, match="no scheme 'odd'"):
        TokenClassification.from_description({**task.describe(), "scheme": "odd"}, asked_for(folder))
    with pytest.raises(DataError, match="--text 2: no words"):
        again.table_of(["a", " "])


def test_a_saved_body_brings_its_tokenizer(folder, tmp_path):
    task = task_of(folder)
    task.save_body(task.build(asked_for(folder)).body, str(tmp_path))
    again = TokenClassification.from_description(task.describe(), asked_for(tmp_path))
    assert again.encode(table()).inputs == task.encode(table()).inputs


def test_another_file_may_have_other_columns_and_no_tags(folder):
    task = task_of(folder)
    task.rows_for(Table({"words": WORDS, "tags": TAGS}, ["a", "b", "c"]), labelled=True)
    assert (task.columns.tokens, task.columns.tags) == ("words", "tags")
    untagged = Table({"column_1": WORDS}, ["a", "b", "c"])
    task.rows_for(untagged, labelled=False)
    assert (task.columns.tokens, task.columns.tags) == ("column_1", None)
    assert task.check(untagged) == {}


def test_contrasts_show_entities_as_words(folder):
    task = task_of(folder)
    targets = task.encode(table()).targets
    base = targets.clone()
    base[1, 3] = 0
    (found,) = task.contrasts(table(), targets, base, targets)
    assert (found.text, found.better) == ("the plots of film", "tuned")
    assert (found.truth, found.base) == ("plots of film (B)", "plots of (B)")


def test_plain_tags_have_a_majority_to_be_compared_with(folder):
    task = task_of(folder, scheme="plain")
    targets = task.encode(table()).targets
    name, answers = task.constant(targets, 3)
    assert name == "majority"
    assert task.score(answers, targets)["accuracy"] == 3 / 9  # "O"
    assert task_of(folder).constant(targets, 3) is None


def test_a_decoder_reads_words_too_and_an_encoder_decoder_is_refused(tmp_path):
    llama = tiny_llama(tmp_path)
    task = task_of(llama)
    assert task.sub_words.space == ""
    _, batch = batch_of(task, table())
    assert task.build(asked_for(llama))(batch).shape == (9, 5)
    from transformers import T5Config, T5Model

    body = T5Model(T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=10))
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        TokenClassifier(body, 3)


def test_byte_level_tokenizers_see_words_as_in_running_text(folder):
    from tokenizers import pre_tokenizers
    from transformers import GPT2Tokenizer

    vocabulary = {mark: i for i, mark in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|endoftext|>": len(vocabulary), "Ġb": len(vocabulary) + 1}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[("Ġ", "b")], pad_token="<|endoftext|>")
    made = task_of(folder)
    task = TokenClassification(tokenizer, made.columns, made.tags, 16)
    ids = task.encode(table([["a", "b"]], [["O", "O"]])).inputs[0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "Ġb"]
