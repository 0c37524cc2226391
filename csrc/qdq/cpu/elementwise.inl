// The kernels of qdq, one body for every level; the level brings simd/<level>.h before this.
#include "../qdq.h"
#include "rows.inl"

namespace {

using namespace fs::qdq;

constexpr int kGroup = 4 * Simd::kWidth;  // codes of one store
constexpr int kMaskGroup = Simd::kWidth < 8 ? 8 : Simd::kWidth;

// Bytes that a pass over floats prefetches ahead of its reads. Measured in docs/kernels/qdq.md.
constexpr int kAheadAbsmax = 2048;
constexpr int kAhead = 4096;

// The lines of kCount elements at p.
template <int kCount, class T>
inline void prefetch(const T* p) {
  for (int line = 0; line < kCount * static_cast<int>(sizeof(T)); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + line);
}

inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// The parameters of a row: one for all its elements, or one each.
struct Uniform {
  Simd::F scale_, inverse_;
  Simd::I zero_;
  Uniform(const MapArgs& a, int64_t row) {
    const int64_t c = (a.channel + row) % a.channels;
    scale_ = Simd::set1(a.scale[c]);
    inverse_ = Simd::set1(1.0f / a.scale[c]);
    zero_ = Simd::set1_s32(a.zero_point ? a.zero_point[c] : 0);
  }
  Simd::F scale(int64_t) const { return scale_; }
  Simd::F inverse(int64_t) const { return inverse_; }
  Simd::I zero(int64_t) const { return zero_; }
};

struct Varying {
  const float *scale_, *inverse_;
  const int32_t* zero_;
  Varying(const MapArgs& a, int64_t) : scale_(a.scale), inverse_(a.inverse), zero_(a.zero_point) {}
  Simd::F scale(int64_t i) const { return Simd::load(scale_ + i); }
  Simd::F inverse(int64_t i) const { return Simd::load(inverse_ + i); }
  Simd::I zero(int64_t i) const { return Simd::load_s32(zero_ + i); }
};

// code(i, vector of x) -> s32 vector, over a row. Prefetches `ahead` elements before they are read, if > 0.
template <bool kStream, class T, class Code>
inline void write_codes(const T* x, int8_t* codes, int64_t n, int64_t ahead, const Code& code) {
  using S = Simd;
  constexpr int w = S::kWidth;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    if (ahead > 0) prefetch<kGroup>(x + i + ahead);
    const S::I packed = S::pack_s8(code(i, S::load(x + i)), code(i + w, S::load(x + i + w)),
                                   code(i + 2 * w, S::load(x + i + 2 * w)), code(i + 3 * w, S::load(x + i + 3 * w)));
    if constexpr (kStream)
      S::stream_s8(codes + i, packed);
    else
      S::store_s8(codes + i, packed);
  }
  if (i < n) {
    const int count = static_cast<int>(n - i);
    int8_t rest[kGroup];
    S::store_s8(rest, S::pack_s8(code(i, load_up_to(x + i, count)), code(i + w, load_up_to(x + i + w, count - w)),
                                 code(i + 2 * w, load_up_to(x + i + 2 * w, count - 2 * w)),
                                 code(i + 3 * w, load_up_to(x + i + 3 * w, count - 3 * w))));
    memcpy(codes + i, rest, static_cast<size_t>(count));
  }
}

template <class T, class Code>
inline void write_codes(const T* x, int8_t* codes, int64_t n, int64_t ahead, bool stream, const Code& code) {
  if (stream && aligned(codes, kGroup))
    write_codes<true>(x, codes, n, ahead, code);
  else
    write_codes<false>(x, codes, n, ahead, code);
}

template <class T>
void quantize_per_token_as(const TokenArgs& a) {
  using S = Simd;
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    int8_t* codes = a.codes + r * a.k;
    if (!row_scale(absmax_bits<kAheadAbsmax>(x, a.k), a.scale + r)) {
      memset(codes, 0, static_cast<size_t>(a.k));
      continue;
    }
    const S::F inverse = S::set1(1.0f / a.scale[r]);
    const int64_t next = r + 1 < a.rows ? a.x_stride : 0;
    write_codes(x, codes, a.k, next, a.stream, [=](int64_t, S::F v) { return dynamic_code(v, inverse); });
  }
}

template <class T, class Row>
void quantize_as(const MapArgs& a) {
  constexpr int64_t ahead = kAhead / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < a.rows; ++r) {
    const Row p(a, r);
    write_codes(static_cast<const T*>(a.in) + r * a.stride, static_cast<int8_t*>(a.out) + r * a.stride, a.length, ahead,
                a.stream, [=](int64_t i, Simd::F v) { return static_code(v, p.inverse(i), p.zero(i)); });
  }
}

// body(i, count): a vector of the row, count = kWidth or what is left of it.
template <class Body>
inline void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + Simd::kWidth <= n; i += Simd::kWidth) body(i, Simd::kWidth);
  if (i < n) body(i, static_cast<int>(n - i));
}

template <bool kStream, class T>
inline void put(T* p, Simd::F v, int count) {
  if (count < Simd::kWidth)
    Simd::store_n(p, v, count);
  else if constexpr (kStream)
    Simd::stream(p, v);
  else
    Simd::store(p, v);
}

template <bool kStream, class T, class Row>
inline void dequantize_row(const int8_t* codes, T* y, int64_t n, const Row& p) {
  using S = Simd;
  for_each_vector(n, [=](int64_t i, int count) {
    const S::I q = count == S::kWidth ? S::load_s8(codes + i) : S::load_s8_n(codes + i, count);
    put<kStream>(y + i, S::mul(S::to_f32(S::sub_s32(q, p.zero(i))), p.scale(i)), count);
  });
}

// The steps of a row whose mask bits make whole bytes: step(i, count) -> the bits of that vector.
template <bool kMask, class Step>
inline void for_each_mask_group(int64_t n, uint8_t* mask, const Step& step) {
  int64_t i = 0;
  for (; i + kMaskGroup <= n; i += kMaskGroup) {
    uint32_t bits = 0;
    for (int j = 0; j < kMaskGroup; j += Simd::kWidth) bits |= step(i + j, Simd::kWidth) << j;
    if constexpr (kMask) memcpy(mask + i / 8, &bits, kMaskGroup / 8);
  }
  if (i == n) return;
  const int count = static_cast<int>(n - i);
  uint32_t bits = 0;
  for (int j = 0; j < count; j += Simd::kWidth)
    bits |= step(i + j, count - j < Simd::kWidth ? count - j : Simd::kWidth) << j;
  bits &= (1u << count) - 1;
  if constexpr (kMask) memcpy(mask + i / 8, &bits, static_cast<size_t>((count + 7) / 8));
}

template <bool kMask, bool kStream, class T, class Row>
inline void fake_row(const T* x, T* y, uint8_t* mask, int64_t n, const Row& p, Simd::I lowest, Simd::I highest) {
  using S = Simd;
  for_each_mask_group<kMask>(n, mask, [=](int64_t i, int count) {
    prefetch<S::kWidth>(x + i + kAhead / static_cast<int64_t>(sizeof(T)));
    const S::F v = load_up_to(x + i, count);
    const S::I q = static_code(v, p.inverse(i), p.zero(i));
    const S::I clamped = S::max_s32(lowest, S::min_s32(highest, q));
    put<kStream>(y + i, S::mul(S::to_f32(S::sub_s32(clamped, p.zero(i))), p.scale(i)), count);
    return kMask ? S::inside_bits(q, lowest, highest, v) : 0u;
  });
}

template <bool kStream, class T>
inline void grad_row(const T* grad, T* out, const uint8_t* mask, int64_t n) {
  using S = Simd;
  int64_t i = 0;
  for (; i + kMaskGroup <= n; i += kMaskGroup) {
    uint32_t bits = 0;
    memcpy(&bits, mask + i / 8, kMaskGroup / 8);
    prefetch<kMaskGroup>(grad + i + kAhead / static_cast<int64_t>(sizeof(T)));
    for (int j = 0; j < kMaskGroup; j += S::kWidth)
      put<kStream>(out + i + j, S::keep(S::load(grad + i + j), bits >> j), S::kWidth);
  }
  if (i == n) return;
  const int count = static_cast<int>(n - i);
  uint32_t bits = 0;
  memcpy(&bits, mask + i / 8, static_cast<size_t>((count + 7) / 8));
  for (int j = 0; j < count; j += S::kWidth) {
    const int lanes = count - j < S::kWidth ? count - j : S::kWidth;
    put<kStream>(out + i + j, S::keep(load_up_to(grad + i + j, lanes), bits >> j), lanes);
  }
}

// Streaming stores of floats need a whole vector's alignment, a row at a time.
template <class T>
inline bool may_stream(const MapArgs& a, const T* row) {
  return a.stream && aligned(row, Simd::kWidth * static_cast<int64_t>(sizeof(T)));
}

template <class T, class Row>
void dequantize_as(const MapArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const int8_t* codes = static_cast<const int8_t*>(a.in) + r * a.stride;
    T* y = static_cast<T*>(a.out) + r * a.stride;
    const Row p(a, r);
    if (may_stream(a, y))
      dequantize_row<true>(codes, y, a.length, p);
    else
      dequantize_row<false>(codes, y, a.length, p);
  }
}

template <class T, class Row>
void fake_quantize_as(const MapArgs& a) {
  const Simd::I lowest = Simd::set1_s32(a.lowest), highest = Simd::set1_s32(a.highest);
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.in) + r * a.stride;
    T* y = static_cast<T*>(a.out) + r * a.stride;
    uint8_t* mask = a.mask ? a.mask + r * a.mask_stride : nullptr;
    const Row p(a, r);
    const bool stream = may_stream(a, y);
    if (mask && stream)
      fake_row<true, true>(x, y, mask, a.length, p, lowest, highest);
    else if (mask)
      fake_row<true, false>(x, y, mask, a.length, p, lowest, highest);
    else if (stream)
      fake_row<false, true>(x, y, mask, a.length, p, lowest, highest);
    else
      fake_row<false, false>(x, y, mask, a.length, p, lowest, highest);
  }
}

template <class T>
void fake_quantize_grad_as(const MapArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* grad = static_cast<const T*>(a.in) + r * a.stride;
    T* out = static_cast<T*>(a.out) + r * a.stride;
    if (may_stream(a, out))
      grad_row<true>(grad, out, a.mask + r * a.mask_stride, a.length);
    else
      grad_row<false>(grad, out, a.mask + r * a.mask_stride, a.length);
  }
}

void quantize_per_token(const TokenArgs& a) {
  switch (a.dtype) {
    case DType::f32: quantize_per_token_as<float>(a); break;
    case DType::bf16: quantize_per_token_as<fs::bf16>(a); break;
    case DType::f16: quantize_per_token_as<fs::f16>(a); break;
  }
  Simd::stream_end();
}

template <class T>
struct Type {
  using type = T;
};

// call(Type<float type>, Type<Uniform or Varying>), picked from the arguments.
template <class Call>
inline void with_types(const MapArgs& a, const Call& call) {
  const auto with_row = [&](auto element) {
    if (a.varying)
      call(element, Type<Varying>());
    else
      call(element, Type<Uniform>());
  };
  switch (a.dtype) {
    case DType::f32: with_row(Type<float>()); break;
    case DType::bf16: with_row(Type<fs::bf16>()); break;
    case DType::f16: with_row(Type<fs::f16>()); break;
  }
  Simd::stream_end();
}

void quantize(const MapArgs& a) {
  with_types(a, [&](auto t, auto row) { quantize_as<typename decltype(t)::type, typename decltype(row)::type>(a); });
}

void dequantize(const MapArgs& a) {
  with_types(a, [&](auto t, auto row) { dequantize_as<typename decltype(t)::type, typename decltype(row)::type>(a); });
}

void fake_quantize(const MapArgs& a) {
  with_types(a,
             [&](auto t, auto row) { fake_quantize_as<typename decltype(t)::type, typename decltype(row)::type>(a); });
}

void fake_quantize_grad(const MapArgs& a) {
  switch (a.dtype) {
    case DType::f32: fake_quantize_grad_as<float>(a); break;
    case DType::bf16: fake_quantize_grad_as<fs::bf16>(a); break;
    case DType::f16: fake_quantize_grad_as<fs::f16>(a); break;
  }
  Simd::stream_end();
}

constexpr Kernels kernels(const char* name, fs::isa::Level level, uint32_t features) {
  return {name,        level,          features,           kGroup, &quantize_per_token, &quantize,
          &dequantize, &fake_quantize, &fake_quantize_grad};
}

}  // namespace
