"""Pruning: masks that hold while the model is trained, and sparse layers where they were measured to be faster."""

from fastsparse.prune.api import cubic, finalize_, prune_, to_sparse_
from fastsparse.prune.config import Magnitude, Sparse, SparseInt8

__all__ = ["Magnitude", "Sparse", "SparseInt8", "cubic", "finalize_", "prune_", "to_sparse_"]
