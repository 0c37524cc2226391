// What the ops that carry autograd share (ops.cpp, training_ops.cpp).
#pragma once
#include "../runtime/checks.h"

namespace fs::sparse_matmul {

inline Tensor empty_as(const Tensor& t) {
  int64_t shape[64];  // torch allows no more dimensions
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return empty(t, shape, t.dim(), t.scalar_type());
}

// In the place of a result that there is none of.
inline Tensor empty_vector(const Tensor& like) {
  const int64_t none = 0;
  return empty(like, &none, 1, ScalarType::Float);
}

// On CUDA torch's own op stands behind a layer of which gradients are recorded.
inline void check_no_activation(const char* op, int64_t activation) {
  if (activation != 0)
    fail(op, "activation must be 0 (none) on cuda where gradients are recorded, got " + std::to_string(activation));
}

}  // namespace fs::sparse_matmul
