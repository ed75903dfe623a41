"""Which cases a law is tried on, by the name of its argument."""

from collections.abc import Callable

import pytest
import torch

from .cases import Case, cases

CHOICES: dict[str, Callable[[Case], bool]] = {
    "case": lambda case: case.dtype == torch.float32,
    "typical_case": lambda case: case.dtype == torch.float32 and case.body.typical,
    "stored_case": lambda case: True,
    "mergeable_case": lambda case: case.is_mergeable,
    "unmergeable_case": lambda case: (
        case.dtype == torch.float32 and not case.is_mergeable and not case.is_quantised_anew
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, is_tried in CHOICES.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, [case for case in cases() if is_tried(case)], ids=str)
