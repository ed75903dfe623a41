"""Which statistics BatchNorms run on: the base's, also while training (`TaskModel`), unless an adapter has its own.

Those of an adapter follow the batches (`batchnorm_tuning` with `statistics: adapted`): such norms train with the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...core.adapter import HELD
from ..base import Decisions


def say_batch_statistics(body: nn.Module, plan: Decisions) -> None:
    """Enter in the plan what becomes of the statistics of the body's BatchNorms, if it has some."""
    if norms := sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in body.modules()):
        what = f"{norms} BatchNorms keep the base's, but for a method with statistics of its own"
        plan.decide("batch statistics", None, "frozen", f"{what} (batchnorm_tuning, statistics: adapted)")


def train_adapted_norms(body: nn.Module, mode: bool) -> None:
    """Let the norms whose adapters have statistics of their own follow the batches, or rest."""
    for norm in _adapted_norms(body):
        norm.training = mode


@contextmanager
def at_rest(body: nn.Module) -> Iterator[None]:
    """All norms rest inside: without its adapter, one that follows the batches would change the base's statistics."""
    following = [norm for norm in _adapted_norms(body) if norm.training]
    try:
        for norm in following:
            norm.training = False
        yield
    finally:
        for norm in following:
            norm.training = True


def _adapted_norms(body: nn.Module) -> Iterator[nn.Module]:
    for norm in body.modules():
        if any(getattr(adapter, "adapts", False) for adapter in getattr(norm, HELD, nn.Module()).children()):
            yield norm
