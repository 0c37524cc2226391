// sparse_matmul, scalar: the level that every machine runs, and the plainest statement of what the others compute.
#include "../../runtime/simd/scalar.h"

namespace {

struct Lanes {
  float v[16];
  static Lanes zero() { return {}; }
  static Lanes load(const float* p) {
    Lanes l;
    memcpy(l.v, p, sizeof l.v);
    return l;
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
  static Lanes expand(const float* value, const float*, uint32_t mask) {
    Lanes l{};
    for (int i = 0; i < 16; ++i)
      if (mask >> i & 1) l.v[i] = *value++;
    return l;
  }
  static float broadcast(const float* p) { return *p; }
  static Lanes fma(const Lanes& w, float x, const Lanes& s) {
    Lanes l;
    for (int i = 0; i < 16; ++i) l.v[i] = Simd::fma(w.v[i], x, s.v[i]);
    return l;
  }
  static Lanes multiply_add(const Lanes& w, const Lanes& x, const Lanes& s) {
    Lanes l;
    for (int i = 0; i < 16; ++i) l.v[i] = Simd::fma(w.v[i], x.v[i], s.v[i]);
    return l;
  }
  struct Index {
    uint16_t k[16];
    explicit Index(const uint8_t* p) { memcpy(k, p, sizeof k); }
    Lanes of(const float* x) const {
      Lanes l;
      for (int i = 0; i < 16; ++i) l.v[i] = x[k[i]];
      return l;
    }
  };
};
using Narrow = Lanes;
using Wide = Lanes;

inline void transpose8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t j = 0; j < 8; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

struct Four {
  const float* p;
  explicit Four(const float* from) : p(from) {}
  template <int kLane>
  float at() const {
    return p[kLane];
  }
};

}  // namespace

#include "kernels.inl"
#include "panels.inl"

namespace {

struct Dot {
  struct F {
    float v[16];
  };
  struct Half {  // by quarter, then by dot product
    float v[4][4];
  };
  struct Four {
    float v[4];
  };
  static constexpr int kWidth = 16;
  static F load(const float* p) {
    F f;
    memcpy(f.v, p, sizeof f.v);
    return f;
  }
  static F mul(const F& a, const F& b) {
    F f;
    for (int i = 0; i < 16; ++i) f.v[i] = a.v[i] * b.v[i];
    return f;
  }
  static F fma(const F& a, const F& b, const F& c) {
    F f;
    for (int i = 0; i < 16; ++i) f.v[i] = Simd::fma(a.v[i], b.v[i], c.v[i]);
    return f;
  }
  static Half fold(const F& a, const F& b, const F& c, const F& d) {
    Half h;
    const F* const all[4] = {&a, &b, &c, &d};
    for (int quarter = 0; quarter < 4; ++quarter)
      for (int i = 0; i < 4; ++i) {
        const float* const lane = all[i]->v + 4 * quarter;
        h.v[quarter][i] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
      }
    return h;
  }
  static Four sum(const Half& h) {
    Four f;
    for (int i = 0; i < 4; ++i) f.v[i] = (h.v[0][i] + h.v[2][i]) + (h.v[1][i] + h.v[3][i]);
    return f;
  }
  static void store(float* p, const Four& f, int n = 4) {
    for (int i = 0; i < n; ++i) p[i] = f.v[i];
  }
  static void add(float* p, const Four& f, int n = 4) {
    for (int i = 0; i < n; ++i) p[i] += f.v[i];
  }
};

}  // namespace

#include "sddmm.inl"

namespace {

void bitmap(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Narrow, 1>(a);
    case 2: return bitmap_rows<Wide, 2>(a);
    case 3: return bitmap_rows<Wide, 3>(a);
    default: return bitmap_rows<Wide, 4>(a);
  }
}

void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return panel_lanes<8, 1>(a);
    case 16: return panel_lanes<16, 1>(a);
    default: return panel_lanes<32, 1>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::kScalar = {
    "scalar", fs::isa::Level::scalar, fs::isa::kLevelScalar, &bitmap, &sell, &panels, &transpose,
    &finish,  &sample_block};
