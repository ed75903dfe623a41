"""What packing the frozen weights of linear layers beforehand would bring on a processor.

oneDNN lays a weight out anew for each product, unless it was packed before, for one number of rows. Compared are the
two products with a weight, x W^T and dy W, made of W as it is by PyTorch's usual library and by oneDNN, and of W packed
by oneDNN. Each of the two products needs a packed copy of its own, beside W, which everything else reads.

    python benchmarks/packed.py [--rounds 9]
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import Run, cpu_seconds, described, interleaved, one_thread, over, save

SHAPES = ((1024, 1024), (1024, 2816), (384, 1536))
ROWS = (32, 512)
USUAL, ONEDNN, PACKED = "usual", "oneDNN", "oneDNN, packed"


def products(rows: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> dict[str, Run]:
    """Both products of a layer, by each way."""
    x, dy = torch.randn(rows, fan_in).to(dtype), torch.randn(rows, fan_out).to(dtype)
    W = torch.randn(fan_out, fan_in).div(fan_in**0.5).to(dtype)
    operators: Any = torch.ops.mkldnn
    with torch.no_grad():
        forward = operators._reorder_linear_weight(W, rows)
        backward = operators._reorder_linear_weight(W.T.contiguous(), rows)
    pointwise = operators._linear_pointwise

    def both(of_x: Any, of_dy: Any) -> Run:
        return lambda: [(of_x(), of_dy()) for _ in range(20)]

    by_onednn = (partial(pointwise, each, w, None, "none", [], "") for each, w in ((x, W), (dy, W.T)))
    by_packed = (partial(pointwise, each, w, None, "none", [], "") for each, w in ((x, forward), (dy, backward)))
    usual = (partial(torch.mm, x, W.T), partial(torch.mm, dy, W))
    return {USUAL: both(*usual), ONEDNN: both(*by_onednn), PACKED: both(*by_packed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    one_thread()
    rows: list[list[Any]] = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for fan_in, fan_out in SHAPES:
                for count in ROWS:
                    found = over(interleaved(products(count, fan_in, fan_out, dtype), asked.rounds, cpu_seconds), USUAL)
                    name = f"{fan_in}x{fan_out}, {count} rows, {str(dtype).removeprefix('torch.')}"
                    rows.append([name, found[ONEDNN], found[PACKED]])
    table = {"title": "Time over the usual library", "columns": ["x W^T and dy W", ONEDNN, PACKED], "rows": rows}
    save("packed", "Packed weights", described(__doc__), [table], [])


if __name__ == "__main__":
    main()
