"""Ranks against a sort, metrics against scikit-learn and their definitions."""

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

from smidgen.tasks.ranking import ranks as ranking
from smidgen.tasks.ranking.ranks import mrr_at, ndcg_at, ranks, ranks_of_vectors, recall_at


@pytest.fixture
def scores():
    return torch.randn(40, 25)


@pytest.fixture
def relevant():
    return torch.randint(25, (40,))


def test_without_ties_the_rank_is_the_place_in_the_sorted_list(scores, relevant):
    order = scores.argsort(dim=1, descending=True)
    places = [row.tolist().index(int(item)) + 1 for row, item in zip(order, relevant, strict=True)]
    assert ranks(scores, relevant).tolist() == places


def test_ties_share_the_place_expected_of_a_random_order(relevant):
    flat = torch.zeros(40, 25)
    assert ranks(flat, relevant).tolist() == [13.0] * 40  # (25 + 1) / 2
    assert ranks(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), torch.tensor([2])).tolist() == [3.0]


def test_the_middle_place_of_ties_is_scipys_average_rank(relevant):
    from scipy.stats import rankdata

    coarse = torch.randint(4, (40, 25)).float()
    expected = [rankdata(-row.numpy())[item] for row, item in zip(coarse, relevant, strict=True)]
    assert ranks(coarse, relevant).tolist() == pytest.approx(expected)


def test_excluded_candidates_do_not_compete_and_the_relevant_one_cannot_be_excluded():
    scores = torch.tensor([[5.0, 4.0, 3.0, 3.0]])
    exclude = torch.tensor([[True, False, True, True]])
    assert ranks(scores, torch.tensor([2])).tolist() == [3.5]
    assert ranks(scores, torch.tensor([2]), exclude).tolist() == [2.0]


def test_scores_that_are_not_a_number_are_last():
    scores = torch.tensor([[float("nan"), 1.0, 2.0], [float("nan"), 1.0, 2.0]])
    assert ranks(scores, torch.tensor([0, 1])).tolist() == [3.0, 2.0]


def test_metrics_equal_scikit_learns(scores, relevant):
    truth = torch.nn.functional.one_hot(relevant, 25)
    found = ranks(scores, relevant)
    for k in (1, 5, 10, 25):
        assert float(ndcg_at(found, k).mean()) == pytest.approx(ndcg_score(truth, scores, k=k), abs=1e-6)
    everywhere = label_ranking_average_precision_score(truth, scores)  # with one relevant item: the reciprocal rank
    assert float(mrr_at(found, 25).mean()) == pytest.approx(everywhere, abs=1e-6)


def test_metrics_are_their_definitions():
    found = torch.tensor([1.0, 2.0, 10.0, 11.0])
    assert recall_at(found, 10).tolist() == [1, 1, 1, 0]
    assert recall_at(found, 1).tolist() == [1, 0, 0, 0]
    assert mrr_at(found, 10).tolist() == pytest.approx([1, 1 / 2, 1 / 10, 0])
    assert ndcg_at(found, 10).tolist() == pytest.approx([1, 1 / np.log2(3), 1 / np.log2(11), 0])


def test_blocks_of_rows_change_nothing(monkeypatch):
    queries, candidates, relevant = torch.randn(17, 4), torch.randn(9, 4), torch.randint(9, (17,))
    exclude = torch.tensor([[0, 1], [0, 2], [8, 3], [16, 0]])
    mask = torch.zeros(17, 9, dtype=torch.bool)
    mask[exclude[:, 0], exclude[:, 1]] = True
    expected = ranks(queries @ candidates.T, relevant, mask)
    assert ranks_of_vectors(queries, candidates, relevant, exclude).tolist() == expected.tolist()
    monkeypatch.setattr(ranking, "_BLOCK", 30)  # three rows at a time
    assert ranks_of_vectors(queries, candidates, relevant, exclude).tolist() == expected.tolist()
    assert ranks_of_vectors(queries[:0], candidates, relevant[:0]).shape == (0,)
