"""SparseAdapter: what all methods share that change a few entries of a weight.

W' = W + D          D is v at the chosen entries of W and zero elsewhere          v: (n,)

The gradient of v is dD = dy^T x at those entries.  Where they are few, a processor makes these alone.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from .errors import require
from .full_weight import FullWeightAdapter, Gradients, Pullback
from .site import Site

_FEW = 0.1  # share of entries up to which each by itself costs less than all of them, by measurement


class SparseAdapter(FullWeightAdapter):
    """A subclass has `values` (n,), and `places`."""

    values: nn.Parameter

    def places(self) -> Tensor:
        """Where the values are in the weight as a flat matrix (O I,); int64, all different."""
        raise NotImplementedError

    def sparse_delta(self, rows: slice) -> Tensor:
        """Rows (rows, I) of D."""
        (O, I), places = matrix_shape(self.site), self.places()
        values: Tensor = self.values
        if rows != slice(None):  # while running it is all rows, and no shape depends on the places: that compiles
            first, end, _ = rows.indices(O)
            here = (places >= first * I) & (places < end * I)
            places, values, O = places[here] - first * I, values[here], end - first
        return values.new_zeros(O * I).scatter(0, places, values).view(O, I)

    def weight_delta(self, rows: slice) -> Tensor:
        return self.sparse_delta(rows)

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        assert rows == slice(None), "sparse changes are made as a whole"
        values, places = self.values, self.places()
        V = values.new_zeros(matrix_shape(self.site)) if W is None else W.clone(memory_format=torch.contiguous_format)
        V.view(-1).index_add_(0, places, values)

        def back(dD: Tensor, gradients: Gradients) -> None:
            gradients[values].add_(dD.reshape(-1).index_select(0, places))

        return V, back

    def pull(self, back: Pullback, dy: Tensor, x: Tensor, dtype: torch.dtype, gradients: Gradients) -> None:
        if self.pulls_few(dy):
            gradients[self.values].add_(few_of_product(dy, x, self.places()))
        else:
            super().pull(back, dy, x, dtype, gradients)

    def pulls_few(self, dy: Tensor) -> bool:
        """True where the values' gradient is made without the others of dD."""
        return cost_less(len(self.values), matrix_shape(self.site), dy, self.values)


def cost_less(count: int, shape: tuple[int, int], dy: Tensor, like: Tensor) -> bool:
    """True where so many entries of dD (O, I) cost less by `few_of_product` than all of them; like: a parameter."""
    return dy.device.type == "cpu" and dy.dtype == like.dtype and count <= _FEW * shape[0] * shape[1]


def few_of_product(dy: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """Entries of dy^T x (O, I) at these flat places: (n,).   dy: (N, O)   x: (N, I), on a processor."""
    _let_sparse_rows_warn()
    O, I = dy.shape[1], x.shape[1]
    order = None if bool((places[1:] > places[:-1]).all()) else places.argsort()
    ordered = places if order is None else places[order]
    first = torch.searchsorted(ordered, torch.arange(O + 1, device=places.device) * I)  # of each row
    empty = torch.sparse_csr_tensor(first, ordered % I, dy.new_zeros(len(places)), (O, I), check_invariants=False)
    found = torch.sparse.sampled_addmm(empty, dy.T, x, beta=0.0).values()
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


@functools.cache
def _let_sparse_rows_warn() -> None:
    """PyTorch says once that sparse rows are in beta: of the one product used here the tests know that it is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def matrix_shape(site: Site) -> tuple[int, int]:
    """(O, I) of the weight as a matrix; stacked experts stand one below the other."""
    return site.linear.stack * site.fan_out, site.fan_in


def check_places(places: Tensor, site: Site) -> None:
    """Raise ConfigError unless these are different flat places in the weight; those of a file may not be."""
    O, I = matrix_shape(site)
    fine = places.ndim == 1 and 0 < len(places) <= O * I and not places.is_floating_point()
    if fine and not places.is_meta:
        ordered = places.sort().values
        fine = int(ordered[0]) >= 0 and int(ordered[-1]) < O * I and bool((ordered[1:] > ordered[:-1]).all())
    require(
        fine,
        f"the indices at {site.name} are not different whole numbers inside a weight of {O} x {I}. "
        "They are of another model, or the file is damaged",
    )
