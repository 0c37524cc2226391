// The helpers behind every tensor check and its message: function, argument, wanted, got. Used by ops.cpp files only.
// A message is built only when a check fails: checks cost a call in the fixed overhead of every op.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "huge_pages.h"

namespace fs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "x[8, 4095]"
inline std::string shape_of(const char* name, const Tensor& t) {
  std::string out = std::string(name) + "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return out + "]";
}

[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + ": " + what);
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(op, std::string(name) + " must be float32, bfloat16 or float16, got " + dtype_name(t.scalar_type()));
  }
}

// A number for a message.
inline std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  if (t.scalar_type() != wanted)
    fail(op, std::string(name) + " must be " + dtype_name(wanted) + ", got " + dtype_name(t.scalar_type()));
}

inline std::string device_name(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

// None in the place of a tensor comes as an undefined one, which can be asked nothing else.
inline void check_given(const char* op, const char* name, const Tensor& t) {
  if (!t.defined()) fail(op, std::string(name) + " must be a tensor, got None");
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  const bool cpu = t.is_cpu();
  if (cpu != x.is_cpu() || (!cpu && t.get_device_index() != x.get_device_index()))
    fail(op, std::string(name) + " must be on " + device_name(x) + " like the first argument, got " + device_name(t));
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  check_given(op, name, t);
  if (!t.is_cpu()) fail(op, std::string(name) + " must be on the CPU, got a tensor on " + device_name(t));
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t length) {
  if (t.dim() != 1 || t.size(0) != length)
    fail(op, std::string(name) + " must have shape [" + std::to_string(length) + "], got " + shape_of(name, t));
}

// An uninitialised contiguous tensor on the device of `like`. Straight to the allocator: new_empty() goes through the
// dispatcher, which costs as much as a small kernel.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType dtype) {
  constexpr int64_t kMaxDims = 64;  // torch itself allows no more
  if (dims > kMaxDims) throw std::invalid_argument("a tensor has more than 64 dimensions");
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_get_device_type(like.get(), &device_type) != 0 ||
      aoti_torch_get_device_index(like.get(), &device_index) != 0 ||
      aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device_index, &handle) != 0)
    throw std::runtime_error("torch could not allocate a tensor of the result's size");
  return Tensor(handle);
}

// The uint8 vector that a pack of `like`, a tensor on the CPU, is written to: huge pages where the system gives them.
inline Tensor empty_pack(const Tensor& like, int64_t bytes) {
  Tensor pack = empty(like, &bytes, 1, ScalarType::Byte);
  advise_huge_pages(pack.mutable_data_ptr(), bytes);
  return pack;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace fs
