// int8_gemm by the short way (direct.h): what ops.cpp and weight_only_ops.cpp would take without a copy or an error.
#include "../direct.h"

#include <cstring>

#include "../runtime/finite.h"
#include "formats/bitmap_u4.h"
#include "formats/u4.h"
#include "formats/vnni16.h"
#include "int8_gemm.h"
#include "select.h"

namespace fs::direct {
namespace {

using namespace int8_gemm;

bool is_pack(const View& weight) {
  return weight.type == Element::u8 && weight.dims == 1 && weight.contiguous() && weight.size[0] >= kPackHeaderBytes;
}

const float* floats(const View* vector) {
  return vector == nullptr ? nullptr : static_cast<const float*>(vector->data);
}

}  // namespace

bool int8_linear(Host& host, const View& x, const View& weight, const View& weight_scale, const View* bias,
                 int64_t activation) {
  LinearArgs a{};
  if (!is_activation(activation)) return false;
  if (x.dims < 1 || !float_type(x, &a.dtype) || !is_pack(weight) || weight_scale.dims != 1) return false;
  a.m = x.rows();
  a.k = x.columns();
  a.n = weight_scale.size[0];
  a.x_stride = row_stride(x);
  if (a.x_stride < 0 || a.k > kMaxK || !weight_scale.is_vector(Element::f32, a.n)) return false;
  if (bias != nullptr && !bias->is_vector(Element::f32, a.n)) return false;
  a.weight = static_cast<const uint8_t*>(weight.data);
  if (!vnni16::header_error(a.weight, weight.size[0], a.n, a.k).empty()) return false;
  a.weight_scale = floats(&weight_scale);
  if (!all_finite(a.weight_scale, a.n)) return false;
  a.x = x.data;
  a.bias = floats(bias);
  a.activation = static_cast<Activation>(activation);
  a.dynamic = true;
  a.x_scale = a.y_scale = 1.0f;
  a.y_dtype = a.dtype;
  const Kernels& kernels = select();
  if (!host.allocate(x, a.n, x.type, &a.y)) return false;
  host.run(a.m * a.n * a.k, [&] { linear(kernels, a); });
  return true;
}

bool int8_mm(Host& host, const View& a, const View& b) {
  if (a.type != Element::s8 || a.dims != 2 || b.type != Element::s8 || b.dims != 2) return false;
  MatmulArgs args{};
  args.m = a.rows();
  args.k = a.columns();
  args.n = b.columns();
  args.a_stride = row_stride(a);
  if (args.a_stride < 0 || b.size[0] != args.k || args.k > kMaxK) return false;
  args.a = static_cast<const int8_t*>(a.data);
  args.b = static_cast<const int8_t*>(b.data);
  args.b_stride_k = b.stride[0];
  args.b_stride_n = b.stride[1];
  const Kernels& kernels = select();
  void* c;
  if (!host.allocate(a, args.n, Element::s32, &c)) return false;
  args.c = static_cast<int32_t*>(c);
  host.run(args.m * args.n * args.k, [&] { matmul(kernels, args); });
  return true;
}

bool weight_only_linear(Host& host, const View& x, const View& weight, const View* weight_scale, const View* bias,
                        int64_t n, int64_t activation) {
  WeightOnlyArgs a{};
  if (!is_activation(activation)) return false;
  if (x.dims < 1 || !float_type(x, &a.dtype) || !is_pack(weight)) return false;
  a.m = x.rows();
  a.k = x.columns();
  a.x_stride = row_stride(x);
  if (a.x_stride < 0) return false;
  a.weight = static_cast<const uint8_t*>(weight.data);
  const int64_t bytes = weight.size[0];
  int64_t packed_k = a.k;
  BitmapU4 bitmap{};
  if (weight_scale != nullptr) {
    if (weight_scale->dims != 1 || !weight_scale->is_vector(Element::f32, weight_scale->size[0])) return false;
    a.n = weight_scale->size[0];
    if (!vnni16::header_error(a.weight, bytes, a.n, a.k).empty()) return false;
    a.weight_scale = floats(weight_scale);
  } else {
    PackHeader header;
    std::memcpy(&header, a.weight, sizeof header);
    u4::Layout layout{};
    if (header.format == bitmap_u4::kFormat) {
      if (!bitmap_u4::header_error(a.weight, bytes, &bitmap).empty()) return false;
      layout = bitmap_u4::layout(bitmap);
      a.bitmap = &bitmap;
      a.bitmap_kernels = bitmap_kernels();
    } else if (!u4::header_error(a.weight, bytes, &layout).empty()) {
      return false;
    }
    a.n = layout.n;
    packed_k = layout.k;
  }
  if (packed_k != a.k || (n >= 0 && n != a.n)) return false;
  if (bias != nullptr && !bias->is_vector(Element::f32, a.n)) return false;
  a.x = x.data;
  a.bias = floats(bias);
  a.activation = static_cast<Activation>(activation);
  const Kernels& kernels = select();
  if (!host.allocate(x, a.n, x.type, &a.y)) return false;
  host.run(a.m * a.n * a.k, [&] { int8_gemm::weight_only_linear(kernels, a); });
  return true;
}

}  // namespace fs::direct
