"""Modules over `fastsparse.ops`: what takes the place of a torch layer in a model."""

from fastsparse.nn.int8_linear import Int8Linear
from fastsparse.nn.sparse_int8_linear import SparseInt8Linear
from fastsparse.nn.sparse_linear import SparseLinear
from fastsparse.nn.trainable_sparse_linear import TrainableSparseLinear
from fastsparse.nn.weight_only_linear import WeightOnlyLinear

__all__ = ["Int8Linear", "SparseInt8Linear", "SparseLinear", "TrainableSparseLinear", "WeightOnlyLinear"]
