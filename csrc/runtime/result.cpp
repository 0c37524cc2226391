#include "result.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fs {

void* new_result(const int64_t* sizes, int dims, Element type, void** data) {
  constexpr int kMostDims = 64;  // torch itself allows no more
  if (dims > kMostDims) return nullptr;
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t code;
  switch (type) {
    case Element::f32: code = aoti_torch_dtype_float32(); break;
    case Element::bf16: code = aoti_torch_dtype_bfloat16(); break;
    case Element::f16: code = aoti_torch_dtype_float16(); break;
    case Element::s32: code = aoti_torch_dtype_int32(); break;
    default: return nullptr;
  }
  AtenTensorHandle tensor = nullptr;
  if (aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &tensor) != 0)
    return nullptr;
  if (aoti_torch_get_data_ptr(tensor, data) == 0) return tensor;
  free_result(tensor);
  return nullptr;
}

void free_result(void* tensor) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(tensor)); }

bool is_grad_enabled() { return aoti_torch_grad_mode_is_enabled(); }

}  // namespace fs
