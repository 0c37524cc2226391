"""Prunes a trained network, then trains what is left of it without ever making a dense weight or gradient.

python examples/sparse_finetune.py [--quick]     (scikit-learn's handwritten digits; nothing is fetched)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastsparse
from fastsparse.nn import TrainableSparseLinear
from fastsparse.prune import Magnitude, finalize_, prune_

SPARSITY = 0.9
BATCH = 256


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data, target = load_digits(return_X_y=True)
    x, y = torch.from_numpy(data).float() / 16, torch.from_numpy(target)
    order = torch.randperm(len(x))
    train, test = order[:-400], order[-400:]
    return x[train], y[train], x[test], y[test]


def batches(x: Tensor, y: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            yield x[rows], y[rows]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> float:
    """Milliseconds a step, the median."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    times = []
    for rows, labels in batches(x, y, epochs):
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1e3


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and few epochs")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    width, epochs = (256, 2) if quick else (1024, 8)

    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip
    dense_ms = train(model, x, y, epochs)
    print(f"dense                   {accuracy(model, test_x, test_y):6.1%}   {dense_ms:6.1f} ms a step")

    prune_(model, Magnitude(SPARSITY, skip=("4",)))  # the last layer is small and stays as it is
    finalize_(model)
    print(f"pruned to {SPARSITY:.0%} zeros     {accuracy(model, test_x, test_y):6.1%}")

    # What is zero in a weight has no value from here on: no gradient, no optimiser state, nothing that could move it.
    for name in ("0", "2"):
        model[int(name)] = TrainableSparseLinear.from_linear(model[int(name)])  # type: ignore[arg-type]
    sparse_ms = train(model, x, y, epochs)
    print(f"fine-tuned, sparse      {accuracy(model, test_x, test_y):6.1%}   {sparse_ms:6.1f} ms a step")

    # For inference the values go into a pack, which has no gradient and needs no refresh.
    sparse: nn.Module = nn.Sequential(
        *(part.to_sparse(rows=1) if isinstance(part, TrainableSparseLinear) else part for part in model)
    )
    zeros = 1 - sum(fastsparse.ops.describe(sparse[i].weight)["nonzeros"] for i in (0, 2)) / (64 * width + width**2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        fastsparse.save(sparse, path)
        size = path.stat().st_size
        loaded = fastsparse.load(path, sparse)
        dense_size = 4 * (64 * width + width**2 + width * 10)
        print(
            f"packed for inference    {accuracy(loaded, test_x, test_y):6.1%}   {zeros:.1%} zeros, "
            f"{size / 1e6:.1f} MB on disk, dense {dense_size / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
