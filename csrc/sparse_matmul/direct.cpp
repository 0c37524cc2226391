// sparse_matmul by the short way (direct.h): what ops.cpp and int8_ops.cpp would take without a copy or an error.
#include "../direct.h"

#include "../runtime/finite.h"
#include "formats/sparse.h"
#include "formats/sparse_s8.h"
#include "int8_select.h"
#include "select.h"
#include "sparse_matmul.h"

namespace fs::direct {

bool sparse_linear(Host& host, const View& x, const View& weight, const View* bias, int64_t n, int64_t activation) {
  using namespace sparse_matmul;
  LinearArgs a{};
  if (!is_activation(activation)) return false;
  if (x.dims < 1 || x.type != Element::f32) return false;
  if (weight.type != Element::u8 || weight.dims != 1 || !weight.contiguous()) return false;
  a.m = x.rows();
  if (!formats::view(static_cast<const uint8_t*>(weight.data), weight.size[0], &a.weight, a.m).empty()) return false;
  a.x_stride = row_stride(x);
  if (a.x_stride < 0 || x.columns() != a.weight.k || (n >= 0 && n != a.weight.n)) return false;
  if (bias != nullptr && !bias->is_vector(Element::f32, a.weight.n)) return false;
  a.x = static_cast<const float*>(x.data);
  a.bias = bias == nullptr ? nullptr : static_cast<const float*>(bias->data);
  a.activation = static_cast<Activation>(activation);
  const Kernels& kernels = select();
  void* y;
  if (!host.allocate(x, a.weight.n, x.type, &y)) return false;
  a.y = static_cast<float*>(y);
  host.run(a.m * a.weight.n * a.weight.k, [&] { linear(kernels, a); });
  return true;
}

bool sparse_int8_linear(Host& host, const View& x, const View& weight, const View& weight_scale, const View* bias,
                        int64_t activation) {
  using namespace sparse_matmul;
  int8::LinearArgs a{};
  if (!is_activation(activation)) return false;
  if (x.dims < 1 || !float_type(x, &a.dtype)) return false;
  if (weight.type != Element::u8 || weight.dims != 1 || !weight.contiguous()) return false;
  int8::Weight w{};
  if (!int8::view(static_cast<const uint8_t*>(weight.data), weight.size[0], false, &w).empty()) return false;
  a.x_stride = row_stride(x);
  if (a.x_stride < 0 || x.columns() != w.k || !weight_scale.is_vector(Element::f32, w.n)) return false;
  if (bias != nullptr && !bias->is_vector(Element::f32, w.n)) return false;
  a.weight_scale = static_cast<const float*>(weight_scale.data);
  if (!all_finite(a.weight_scale, w.n)) return false;
  a.layout = w.layout;
  a.bitmap = w.bitmap;
  a.windows = w.windows;
  a.blocks = w.blocks;
  a.x = x.data;
  a.m = x.rows();
  a.bias = bias == nullptr ? nullptr : static_cast<const float*>(bias->data);
  a.activation = static_cast<Activation>(activation);
  const int8::Kernels& kernels = int8::select();
  if (!host.allocate(x, w.n, x.type, &a.y)) return false;
  host.run(a.m * w.n * w.k, [&] { int8::linear(kernels, a); });
  return true;
}

}  // namespace fs::direct
