// sparse_matmul by the short way (direct.h): what ops.cpp would take without a copy or an error.
#include "../direct.h"

#include "../runtime/pack.h"
#include "formats/sparse.h"
#include "select.h"
#include "sparse_matmul.h"

namespace fs::direct {

bool sparse_linear(Host& host, const View& x, const View& weight, const View* bias, int64_t n, int64_t activation) {
  using namespace sparse_matmul;
  LinearArgs a{};
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

}  // namespace fs::direct
