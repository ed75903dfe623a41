"""SparseAdapter: what all methods share that change a few entries of a weight.

W' = W + D          D is v at the chosen entries of W and zero elsewhere          v: (n,)
"""

from torch import Tensor, nn

from .errors import require
from .full_weight import FullWeightAdapter
from .site import Site


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
