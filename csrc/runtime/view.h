// A tensor in this machine's memory, as the short way of a call sees it (direct.h). Torch-free.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace fs {

enum class Element : int { f32, bf16, f16, s8, u8, s32, other };

struct View {
  const void* data;
  Element type;
  int dims;
  const int64_t *size, *stride;  // in elements

  bool contiguous() const {
    int64_t step = 1;
    bool adjacent = true;
    for (int i = dims - 1; i >= 0; --i) {
      adjacent = adjacent && (size[i] == 1 || stride[i] == step);
      step *= size[i];
    }
    return adjacent || step == 0;  // nothing lies anywhere
  }
  int64_t columns() const { return size[dims - 1]; }
  int64_t rows() const {
    int64_t product = 1;
    for (int i = 0; i + 1 < dims; ++i) product *= size[i];
    return product;
  }
  bool is_vector(Element of, int64_t length) const {
    return type == of && dims == 1 && size[0] == length && (length <= 1 || stride[0] == 1);
  }
};

// The step between rows of x that a kernel reads where they are; -1: they would have to be copied.
inline int64_t row_stride(const View& x) {
  if (x.dims == 2 && (x.stride[1] == 1 || x.size[1] == 1) && x.stride[0] >= x.size[1]) return x.stride[0];
  return x.contiguous() ? x.columns() : -1;
}

// Whether x is of a float type, and of which.
inline bool float_type(const View& x, DType* out) {
  if (x.type != Element::f32 && x.type != Element::bf16 && x.type != Element::f16) return false;
  *out = x.type == Element::f32 ? DType::f32 : x.type == Element::bf16 ? DType::bf16 : DType::f16;
  return true;
}

}  // namespace fs
