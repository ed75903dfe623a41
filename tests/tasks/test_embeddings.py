"""Embeddings: losses against sums written out, ranks against brute force, correlations against scipy."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr

from smidgen.auto.plan import Plan
from smidgen.core.errors import ConfigError, DataError, ModelError, RecipeError
from smidgen.data.table import Table
from smidgen.tasks.base import Asked
from smidgen.tasks.embeddings import Embeddings, EmbeddingsSettings
from smidgen.tasks.models import locate
from smidgen.tasks.text.pair_columns import SIDES, pair_columns, score_range
from smidgen.tasks.text.sentence_pooling import (
    Embedder,
    pooled,
    trained_pooling,
    trained_prompts,
    usual_pooling,
)
from smidgen.tasks.text.sides import sides_as_batch
from smidgen.tasks.text.similarity import Search, connected, contrastive_loss, cosent_loss

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import BAD, GOOD, tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def asked(folder, **more) -> Asked:
    return Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0, **more)


def table(**columns) -> Table:
    return Table(columns, [f"t.csv:{i + 2}" for i in range(len(next(iter(columns.values()))))])


def task_of(folder, rows, columns=None, **settings) -> Embeddings:
    return Embeddings.understand({"train": rows}, EmbeddingsSettings(**settings), asked(folder, columns=columns or {}))


def unit(*shape) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@torch.no_grad()
def vectors_of(task, model, texts) -> torch.Tensor:
    """(N, D), by one call for these queries alone."""
    prompted = [(task.settings.query_prompt or "") + text for text in texts]
    return model({**task.tokenizer(prompted, padding=True, return_tensors="pt"), "targets": texts})[:, 0]


PAIRS = table(anchor=["good film", "a dull plot", "fine music"], positive=["lovely", "boring", "superb"])


# -- losses -----------------------------------------------------------------------------------------------------------
def contrastive_by_hand(vectors, texts, temperature):
    """Sum over rows, written with loops over texts."""
    total = 0.0
    for i, (query, *_) in enumerate(texts):
        known = {row[1] for row in texts if row[0] == query} | {query}
        wrong = [
            math.exp(float(vectors[i, 0] @ vectors[j, side]) / temperature)
            for side in range(1, vectors.shape[1])
            for j in range(len(texts))
            if texts[j][side] not in known
        ]
        own = math.exp(float(vectors[i, 0] @ vectors[i, 1]) / temperature)
        total -= math.log(own / (own + sum(wrong)))
    return total


@pytest.mark.parametrize("sides", [2, 3])
def test_the_contrastive_loss_is_its_formula_and_equal_texts_are_no_negatives(sides):
    numbers = [[0, 10, 20], [1, 11, 21], [0, 12, 11], [2, 10, 12], [3, 2, 22], [4, 13, 20]]
    texts = [row[:sides] for row in numbers]
    vectors = unit(6, sides, 5)
    loss = contrastive_loss(vectors, torch.tensor(texts), 0.2)
    assert float(loss) == pytest.approx(contrastive_by_hand(vectors, texts, 0.2), rel=1e-5)


def test_without_duplicates_the_loss_is_the_cross_entropy_of_the_similarities():
    vectors = unit(6, 2, 5)
    ids = torch.arange(12).view(6, 2)
    logits = vectors[:, 0] @ vectors[:, 1].T / 0.05
    forth = F.cross_entropy(logits, torch.arange(6), reduction="sum")
    back = F.cross_entropy(logits.T, torch.arange(6), reduction="sum")
    torch.testing.assert_close(contrastive_loss(vectors, ids, 0.05), forth)
    torch.testing.assert_close(contrastive_loss(vectors, ids, 0.05, symmetric=True), (forth + back) / 2)


def test_a_batch_without_negatives_has_no_loss_and_no_gradient():
    vectors = unit(2, 2, 4).requires_grad_()
    for ids in ([[0, 1], [0, 1]], [[0, 1], [0, 2]]):
        loss = contrastive_loss(vectors, torch.tensor(ids), 0.05, symmetric=True)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, vectors)[0].abs().max() == 0


def test_the_order_loss_is_its_formula():
    cosines, scores = torch.rand(7), torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0, 3.0, 1.0])
    total = sum(
        math.exp(float(cosines[j] - cosines[i]) / 0.1) for i in range(7) for j in range(7) if scores[i] > scores[j]
    )
    assert float(cosent_loss(cosines, scores, 0.1)) == pytest.approx(math.log(1 + total), rel=1e-5)
    assert float(cosent_loss(cosines, torch.ones(7), 0.1)) == 0.0


def test_the_squared_error_compares_cosines_with_scores_brought_to_one(folder):
    rows = table(sentence1=["good", "bad"], sentence2=["fine", "good"], score=["5", "0"])
    task = task_of(folder, rows, loss="cosine")
    vectors = unit(2, 2, 4)
    cosines = F.cosine_similarity(vectors[:, 0], vectors[:, 1])
    loss, count = task.loss(vectors, {"targets": torch.tensor([5.0, 2.5])})
    assert task.scores == (0.0, 5.0)
    assert (float(loss), count) == (pytest.approx(float((cosines[0] - 1) ** 2 + (cosines[1] - 0.5) ** 2)), 2)
    assert score_range([0.5, -1]) == (0.0, 1.0)
    assert score_range(["-4", "4"]) == (-4.0, 4.0)


# -- judging ----------------------------------------------------------------------------------------------------------
def brute_rank(vectors, texts, i):
    """The rank of row i's document among all different documents, by text."""
    query, right = texts[i][:2]
    known = ({row[1] for row in texts if row[0] == query} | {query}) - {right}
    nearest = {}
    for side in range(1, vectors.shape[1]):
        for j, row in enumerate(texts):
            nearest.setdefault(row[side], float(vectors[i, 0] @ vectors[j, side]))
    return 1 + sum(value > nearest[right] for text, value in nearest.items() if text not in known)


def test_every_query_is_ranked_among_all_different_documents(folder):
    texts = [[i % 17, 100 + i % 13, 90 + i % 30] for i in range(40)] + [[100, 3, 7]]  # a query that is a document too
    table_of = {number: unit(6) for row in texts for number in row}  # equal texts have equal vectors
    vectors = torch.stack([torch.stack([table_of[number] for number in row]) for row in texts])
    search = Search.of(vectors, torch.tensor(texts))
    assert len(search.documents) == len({number for row in texts for number in row[1:]})
    expected = [brute_rank(vectors, texts, i) for i in range(41)]
    assert search.ranks().tolist() == expected
    task = task_of(folder, PAIRS)
    scores = task.score(vectors, torch.tensor(texts))
    assert scores["recall@5"] == pytest.approx(sum(rank <= 5 for rank in expected) / 41)
    assert scores["mrr@10"] == pytest.approx(sum(1 / rank for rank in expected if rank <= 10) / 41)
    for metric in task.metrics:
        task.judge_by(metric)
        parts = task.parts(vectors, torch.tensor(texts))
        assert float(task.value_of(parts.sum(0))) == pytest.approx(scores[metric])


def test_pairs_with_scores_are_judged_as_scipy_does(folder):
    rows = table(sentence1=["good", "bad", "dull"], sentence2=["fine", "good", "boring"], score=[4.0, 1.0, 3.5])
    task = task_of(folder, rows)
    assert task.settings.loss == "cosent"
    assert task.metric == "spearman"
    answers, targets = torch.rand(30), torch.randint(6, (30,)).float()
    scores = task.score(answers, targets)
    assert scores["spearman"] == pytest.approx(spearmanr(answers, targets).statistic, abs=1e-5)
    assert scores["pearson"] == pytest.approx(pearsonr(answers, targets).statistic, abs=1e-5)
    assert task.score(torch.ones(30), targets) == {"spearman": 0.0, "pearson": 0.0}
    vectors = unit(3, 2, 4)
    cosines = F.cosine_similarity(vectors[:, 0], vectors[:, 1])
    torch.testing.assert_close(task.answer(vectors, {}), cosines)


def test_contrasts_show_what_each_model_found(folder):
    task = task_of(folder, PAIRS)
    targets = task.encode(PAIRS).targets
    right = torch.eye(3)[:, None].expand(3, 2, 3)
    swapped = torch.stack([torch.eye(3), torch.eye(3)[[1, 0, 2]]], dim=1)
    found = task.contrasts(PAIRS, targets, base=swapped, tuned=right)
    assert [(e.text, e.truth, e.base, e.tuned, e.better) for e in found] == [
        ("good film", "lovely", "boring", "lovely", "tuned"),
        ("a dull plot", "boring", "lovely", "boring", "tuned"),
    ]


# -- rows -------------------------------------------------------------------------------------------------------------
def test_both_sides_are_one_batch_and_come_back_by_row(folder):
    task = task_of(folder, PAIRS)
    task.max_length = 16
    model = task.build(asked(folder)).eval()
    examples = task.encode(PAIRS)
    assert examples.lengths == [4, 5, 4]
    batch = task.collate(examples, [0, 2])
    assert batch["input_ids"].shape == (4, 4)
    vectors = model(batch)
    assert vectors.shape == (2, 2, 32)
    torch.testing.assert_close(vectors[1, 0], vectors_of(task, model, ["fine music"])[0])
    torch.testing.assert_close(vectors[1, 1], vectors_of(task, model, ["superb"])[0])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 2))


def test_sides_of_other_lengths_are_called_apart_and_give_the_same_vectors(folder):
    rows = table(anchor=["good", "fine music"], positive=["a dull plot and a good film", "lovely"])
    task = task_of(folder, rows)
    task.max_length = 16
    model = task.build(asked(folder)).eval()
    apart = task.collate(task.encode(rows), [0, 1])
    assert {name: tuple(tensor.shape) for name, tensor in apart.items()} == {
        "input_ids.text": (2, 4),
        "attention_mask.text": (2, 4),
        "input_ids.text_pair": (2, 9),
        "attention_mask.text_pair": (2, 9),
        "targets": (2, 2),
    }
    ids = [F.pad(apart[f"input_ids.{side}"], (0, 9 - width)) for side, width in (("text", 4), ("text_pair", 9))]
    masks = [F.pad(apart[f"attention_mask.{side}"], (0, 9 - width)) for side, width in (("text", 4), ("text_pair", 9))]
    together = {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks), "targets": apart["targets"]}
    torch.testing.assert_close(model(apart), model(together))


@pytest.mark.parametrize(("lengths", "is_apart"), [((6, 6), False), ((4, 8), True), ((5, 8), False), ((4, 4, 8), True)])
def test_sides_go_apart_where_a_quarter_of_the_places_would_be_padding(lengths, is_apart):
    batch = sides_as_batch({str(i): [[7] * length] for i, length in enumerate(lengths)}, filler=0)
    assert ("input_ids" not in batch) == is_apart


def test_prompts_stand_before_the_texts_of_their_side(folder):
    rows = table(**PAIRS.columns, negative=["bad", "good", "weak"])
    task = task_of(folder, rows, query_prompt="the ", document_prompt="it ")
    task.max_length = 16
    ids = task.encode(rows).inputs[0]
    decoded = [task.tokenizer.decode(ids[side], skip_special_tokens=True) for side in SIDES]
    assert decoded == ["the good film", "it lovely", "it bad"]


def test_equal_texts_never_stand_on_both_sides_of_a_split(folder):
    rows = table(anchor=["a", "b", "c", "d", "D ", "f", "g", "h"], positive=["1", "1", "2", "3", "4", "a", "6", "7"])
    groups = task_of(folder, rows).groups(rows)
    assert groups[0] == groups[1] == groups[5]  # b shares 1 with a; the text a is an anchor and a positive
    assert groups[3] == groups[4]
    assert len(set(groups)) == 5
    assert connected([[1, 2], [3, 4], [2, 3], [5, 6]])[0:3] == [connected([[1, 2], [3, 4], [2, 3], [5, 6]])[0]] * 3


def test_rows_that_cannot_be_used_are_named(folder):
    rows = table(anchor=["good", "", "Same  text", "fine"], positive=["bad", "x", "same text", None])
    problems = task_of(folder, PAIRS).check(rows)
    assert sorted(problems) == [1, 2, 3]
    assert problems[1] == 'column "anchor": the text is empty'
    assert "two texts of the row are the same" in problems[2]
    scored = table(sentence1=["good", "bad"], sentence2=["fine", "good"], score=[4.0, 1.0])
    bad = table(sentence1=["good"], sentence2=["good"], score=["high"])
    assert task_of(folder, scored).check(bad) == {0: "column \"score\": 'high' is no number"}


def test_a_score_keeps_its_share_and_texts_seen_in_training_are_remarked(folder):
    scored = table(sentence1=["good", "bad"], sentence2=["fine", "good"], score=[4.0, 1.0])
    task = task_of(folder, scored)
    assert task.strata(scored) == [4.0, 1.0]
    assert task_of(folder, PAIRS).strata(PAIRS) is None
    assert (
        "1 of 2 test rows" in task.remarks(scored.select([0]), table(sentence1=["x", "y"], sentence2=["z", "good"]))[0]
    )


# -- columns ----------------------------------------------------------------------------------------------------------
def test_columns_are_found_by_their_names():
    rows = table(query=["a b"], positive=["c"], hard_negative=["d"], id=["1"])
    assert pair_columns(rows, {})[0] == {"text": "query", "text_pair": "positive", "negative": "hard_negative"}
    scored = table(sentence1=["a b"] * 2, sentence2=["c", "d"], label=["0", "1"])
    assert pair_columns(scored, {})[0] == {"text": "sentence1", "text_pair": "sentence2", "score": "label"}
    assert "score" not in pair_columns(scored, {}, scored=False)[0]
    said = pair_columns(table(def_=["a b"], word=["c"]), {"text": "def_", "text_pair": "word"})
    assert said[0] == {"text": "def_", "text_pair": "word"}


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="the second column is not clear"):
        pair_columns(table(text=["a b"], note=["c"]), {"text": "text"})
    both = {"text": "a", "text_pair": "b", "negative": "c", "score": "d"}
    with pytest.raises(RecipeError, match="not both"):
        pair_columns(table(a=["x"], b=["y"], c=["z"], d=["1"]), both)
    with pytest.raises(RecipeError, match="needs the score of each pair"):
        pair_columns(PAIRS, {}, scored=True)
    with pytest.raises(RecipeError, match="no use for a column of scores"):
        pair_columns(table(a=["x"], b=["y"], d=["1"]), {"text": "a", "text_pair": "b", "score": "d"}, scored=False)
    with pytest.raises(ConfigError, match="temperature is 0"):
        EmbeddingsSettings(temperature=0)
    with pytest.raises(ConfigError, match="it is one of contrastive, cosent, cosine"):
        EmbeddingsSettings(loss="triplet")


# -- pooling ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mean", "cls", "last", "max"])
def test_poolings_leave_padding_out(kind):
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    rows = [hidden[0, :3], hidden[1]]
    by_hand = {
        "mean": [row.mean(0) for row in rows],
        "cls": [row[0] for row in rows],
        "last": [row[-1] for row in rows],
        "max": [row.max(0).values for row in rows],
    }[kind]
    expected = torch.stack([v / v.norm() for v in by_hand])
    torch.testing.assert_close(F.normalize(pooled(hidden, mask, kind), dim=1), expected)


def trained(tmp_path, modes, layers=("Transformer", "Pooling", "Normalize"), **more):
    tiny_bert(tmp_path)
    modules = [{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(layers)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(more))
    return locate(str(tmp_path))


def test_pooling_and_prompts_are_those_the_model_was_trained_with(tmp_path):
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}
    model = trained(tmp_path, modes, prompts={"query": "the query: ", "document": "", "passage": "it: "})
    assert trained_pooling(model) == "cls"
    task = task_of(tmp_path, PAIRS)
    assert task.settings.pooling == "cls"
    assert (task.settings.query_prompt, task.settings.document_prompt) == ("the query: ", "it: ")
    assert task_of(tmp_path, PAIRS, pooling="max", query_prompt="").settings.query_prompt == ""
    assert task_of(tmp_path, PAIRS, pooling="max").build(asked(tmp_path)).pooling == "max"


@pytest.mark.parametrize(
    ("modes", "layers", "what"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, ("Transformer", "Pooling"), "pools by pooling_mode_weightedmean"),
        ({"pooling_mode": "mean", "include_prompt": False}, ("Transformer", "Pooling"), "mean without the prompt"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "cls \\+ max"),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling", "Dense"), "through a layer Dense"),
    ],
)
def test_a_pooling_that_is_not_known_is_refused_not_replaced(tmp_path, modes, layers, what):
    model = trained(tmp_path, modes, layers)
    with pytest.raises(ModelError, match=what):
        trained_pooling(model)


def test_a_plain_model_is_pooled_by_its_kind(folder, tmp_path):
    plain = locate(str(folder))
    assert trained_pooling(plain) is None
    assert trained_prompts(plain) == {}
    assert usual_pooling(plain) == "mean"
    assert usual_pooling(locate(str(tiny_llama(tmp_path)))) == "last"


# -- using a result ---------------------------------------------------------------------------------------------------
def test_what_is_described_is_read_back(folder):
    task = task_of(
        folder, table(a=["x", "y"], b=["z", "w"], s=["1", "3"]), {"text": "a", "text_pair": "b", "score": "s"}
    )
    task.max_length = 16
    description = json.loads(json.dumps(task.describe()))
    again = Embeddings.from_description(description, asked(folder))
    assert again.describe() == task.describe()
    assert again.max_length == 16


def test_predictions_are_similarities_of_pairs_and_vectors_of_single_texts(folder):
    task = task_of(folder, PAIRS)
    task.max_length = 16
    model = task.build(asked(folder)).eval()

    @torch.no_grad()
    def answers(rows):
        examples = task.encode(rows)
        batch = task.collate(examples, range(len(rows)))
        return task.answer(model(batch), batch)

    shown = task.predicted(PAIRS, answers(PAIRS))
    expected = F.cosine_similarity(*(vectors_of(task, model, [text])[0] for text in ("good film", "lovely")), dim=0)
    assert shown[0] == {
        "text": "good film",
        "text_pair": "lovely",
        "similarity": pytest.approx(float(expected), abs=1e-4),
    }
    single = task.table_of(["fine music"])
    task.rows_for(single, labelled=False)
    line = task.predicted(single, answers(single))[0]
    assert line["text"] == "fine music"
    assert len(line["embedding"]) == 32
    with pytest.raises(DataError, match="no column of texts: other"):
        task.rows_for(table(other=["x"]), labelled=False)


def test_a_merged_model_brings_its_tokenizer_pooling_and_prompts(folder, tmp_path):
    task = task_of(folder, PAIRS, pooling="max", query_prompt="the ")
    task.max_length = 16
    model = task.build(asked(folder)).eval()
    task.save_body(model.body, str(tmp_path))
    again = task_of(tmp_path, PAIRS)
    again.max_length = 16
    assert (again.settings.pooling, again.settings.query_prompt) == ("max", "the ")
    saved = again.build(asked(tmp_path)).eval()
    torch.testing.assert_close(vectors_of(again, saved, ["fine music"]), vectors_of(task, model, ["fine music"]))
    kinds = [module["type"].split(".")[-1] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize"]


# -- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", ["contrastive", "cosent", "cosine"])
def test_a_tiny_model_learns_what_belongs_together(folder, loss):
    if loss == "contrastive":  # a word and its partner in the other list; nothing in the letters tells it
        rows, said = table(anchor=GOOD, positive=BAD), {}
    else:
        pairs = [(a, b, float(same)) for a in GOOD[:5] for b, same in ((GOOD[5], True), (BAD[0], False))]
        first, second, scores = map(list, zip(*pairs, strict=True))
        rows, said = table(a=first, b=second, score=scores), {"text": "a", "text_pair": "b"}
    task = task_of(folder, rows, said, loss=loss)
    task.max_length = 8
    model: Embedder = task.build(asked(folder))
    examples = task.encode(rows)
    batch = task.collate(examples, range(len(rows)))

    def judged():
        with torch.no_grad():
            return task.score(task.answer(model(batch), batch), examples.targets)[task.metric]

    before = judged()
    optimizer = torch.optim.AdamW(model.body.parameters(), lr=3e-3)
    for _ in range(40):
        total, count = task.loss(model(batch), batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert before < 0.75
    assert judged() > 0.85
