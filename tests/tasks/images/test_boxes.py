"""Overlaps, suppression and COCO's average precision."""

import pytest
import torch
from torch import Tensor

from smidgen.tasks.images.boxes import THRESHOLDS, average_precision, detections, hits, overlaps

CLASSES = 2
COCO_50, COCO_50_95, COCO_BY_CLASS = 0.5302317632293733, 0.2893170172605627, [0.5725114819174226, 0.48795204454132407]


def padded(rows: list[list[list[float]]], width: int) -> Tensor:
    """Rows of each image, (N, most, width), padded with -1."""
    result = torch.full((len(rows), max(map(len, rows)), width), -1.0)
    for i, some in enumerate(rows):
        if some:
            result[i, : len(some)] = torch.tensor(some)
    return result


def judged(found: Tensor, targets: Tensor, classes: int = CLASSES) -> Tensor:
    return average_precision(found[..., 4], found[..., 5], hits(found, targets), targets[..., 0], classes)


def test_overlap_is_shared_area_over_joint_area() -> None:
    a = torch.tensor([[0.0, 0.0, 4.0, 2.0], [10.0, 10.0, 11.0, 11.0]])
    b = torch.tensor([[2.0, 0.0, 6.0, 2.0]])
    assert overlaps(a, b).tolist() == [[pytest.approx(4 / 12)], [0.0]]


def test_a_box_inside_an_empty_one_overlaps_nothing() -> None:
    assert overlaps(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 2.0, 2.0]])).item() == 0.0


def test_average_precision_of_a_case_worked_by_hand() -> None:
    # two true boxes; found by falling score: right, wrong, right.  Precision 1 up to recall 1/2, then 2/3 up to 1:
    # of the 101 recalls 51 see 1 and 50 see 2/3
    targets = padded([[[0, 0, 0, 10, 10], [0, 20, 20, 30, 30]]], 5)
    found = padded([[[0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.8, 0], [20, 20, 30, 30, 0.7, 0]]], 6)
    ap = judged(found, targets)
    assert ap[:, 0].tolist() == [pytest.approx((51 + 50 * 2 / 3) / 101)] * 10
    assert ap[:, 1].isnan().all()  # no true box


def test_a_detection_of_the_wrong_class_is_wrong() -> None:
    targets = padded([[[1, 0, 0, 10, 10]]], 5)
    assert judged(padded([[[0, 0, 10, 10, 0.9, 0]]], 6), targets)[:, 1].tolist() == [0.0] * 10


def test_nothing_found_is_an_average_precision_of_0() -> None:
    assert judged(torch.full((1, 3, 6), -1.0), padded([[[0, 0, 0, 10, 10]]], 5))[0, 0] == 0.0


def test_a_true_box_is_found_once() -> None:
    targets = padded([[[0, 0, 0, 10, 10]]], 5)
    twice = padded([[[0, 0, 10, 9, 0.9, 0], [0, 0, 10, 10, 0.8, 0]]], 6)
    assert hits(twice, targets)[0].tolist() == [
        0b0111111111,
        0b1000000000,
    ]  # IoU 0.9: the second alone is right at 0.95


def test_a_detection_takes_the_true_box_it_overlaps_most_and_the_last_of_equals() -> None:
    targets = padded([[[0, 0, 0, 10, 10], [0, 0, 0, 10, 8]]], 5)
    found = padded([[[0, 0, 10, 8, 0.9, 0], [0, 0, 10, 10, 0.8, 0]]], 6)
    assert hits(found, targets)[0].tolist() == [0b1111111111, 0b1111111111]


def test_thresholds_are_those_of_coco() -> None:
    assert THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def scattered(images: int) -> tuple[Tensor, Tensor]:
    """Made by formula: true boxes of two classes, and detections that are shifted, doubled, confused and invented."""
    targets, found = [], []
    for i in range(images):
        true = [[j % 2, 10.0 * j + i, 5.0 * i, 10.0 * j + i + 12 + j, 5.0 * i + 20] for j in range(i % 4)]
        rows = []
        for j, (label, x1, y1, x2, y2) in enumerate(true):
            off = (7 * i + 3 * j) % 6
            score = ((37 * i + 11 * j) % 97) / 100 + 0.01
            rows.append([x1 + off, y1, x2 + off, y2, score, label])
            rows.append([x1, y1 + off, x2, y2, score / 2 + 0.001, 1 - label if (i + j) % 3 == 0 else label])
        rows.append([3.0 * i, 40.0, 3.0 * i + 15, 60.0, ((53 * i) % 89) / 100 + 0.005, i % 2])
        targets.append(true)
        found.append(sorted(rows, key=lambda row: -row[4]))
    return padded(found, 6), padded(targets, 5)


def test_mean_average_precision_is_that_of_pycocotools() -> None:
    # pycocotools 2.0.11, COCOeval(..., "bbox") over these 24 images: stats[1], stats[0], and by class at 0.5
    found, targets = scattered(24)
    ap = judged(found, targets)
    assert float(ap[0].nanmean()) == pytest.approx(COCO_50, abs=1e-12)
    assert float(ap.nanmean()) == pytest.approx(COCO_50_95, abs=1e-12)
    assert ap[0].tolist() == pytest.approx(COCO_BY_CLASS, abs=1e-12)


def test_an_image_drawn_twice_counts_twice() -> None:
    found, targets = scattered(8)
    rows = torch.tensor([3, 3, 5, 7])
    one = judged(found[rows], targets[rows])
    answers = torch.cat([found, hits(found, targets)[..., None]], -1)[rows]  # hits are found before drawing
    again = average_precision(answers[..., 4], answers[..., 5], answers[..., 6], targets[rows][..., 0], CLASSES)
    assert torch.equal(one, again)


def greedy(boxes: Tensor, scores: Tensor) -> list[tuple[int, int]]:
    """(box, class) that plain greedy suppression keeps, in order."""
    kept: list[tuple[int, int]] = []
    for index in scores.flatten().argsort(descending=True).tolist():
        box, label = divmod(index, scores.shape[1])
        if all(other != label or float(overlaps(boxes[[box]], boxes[[k]])) <= 0.7 for k, other in kept):
            kept.append((box, label))
    return kept


def test_suppression_is_the_greedy_one() -> None:
    corner = torch.rand(2, 60, 2) * 20
    boxes, scores = torch.cat([corner, corner + 15 + torch.rand(2, 60, 2) * 5], -1), torch.rand(2, 60, 3) + 0.01
    found = detections(boxes, scores, 100, suppress=True)
    for i in range(2):
        kept = greedy(boxes[i], scores[i])
        assert 0 < len(kept) < 180
        for row, (box, label) in zip(found[i], kept[:100], strict=False):
            assert torch.equal(row[:4], boxes[i, box])
            assert row[5] == label


def test_detections_are_sorted_and_padded() -> None:
    boxes, scores = torch.zeros(1, 3, 4), torch.tensor([[[0.2, 0.0], [0.9, 0.0], [0.0001, 0.0]]])
    found = detections(boxes, scores, 5, suppress=False)
    assert found.shape == (1, 5, 6)
    assert found[0, :, 4].tolist() == pytest.approx([0.9, 0.2, -1, -1, -1])
