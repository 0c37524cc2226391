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
  static float widened(float value) { return value; }
  static float widened(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T>
  static Lanes expand(const T* value, uint32_t mask) {
    Lanes l{};
    for (int i = 0; i < 16; ++i)
      if (mask >> i & 1) l.v[i] = widened(*value++);
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
};

struct Quad {
  float v[4];
  static Quad zero() { return {}; }
  static Quad load(const float* p) {
    Quad f;
    memcpy(f.v, p, sizeof f.v);
    return f;
  }
  static Quad of_bf16(const uint16_t* p, bool high) {
    Quad f;
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = uint32_t{p[2 * i + high]} << 16;
      memcpy(f.v + i, &bits, 4);
    }
    return f;
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
  static Quad of(const float* x, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return {{x[a], x[b], x[c], x[d]}}; }
  static Quad fma(const Quad& w, const Quad& x, const Quad& s) {
    return {{Simd::fma(w.v[0], x.v[0], s.v[0]), Simd::fma(w.v[1], x.v[1], s.v[1]), Simd::fma(w.v[2], x.v[2], s.v[2]),
             Simd::fma(w.v[3], x.v[3], s.v[3])}};
  }
};

template <class Store>
inline void transpose_tile(const float* in, int64_t, const Store& store) {
  store(0, *in);
}
struct Eight {
  float v[8];
  static Eight zero() { return {}; }
  static Eight load(const float* p) {
    Eight f;
    memcpy(f.v, p, sizeof f.v);
    return f;
  }
  void store(float* p) const { memcpy(p, v, sizeof v); }
  static Eight fma(const Eight& w, const Eight& x, const Eight& s) {
    Eight f;
    for (int i = 0; i < 8; ++i) f.v[i] = Simd::fma(w.v[i], x.v[i], s.v[i]);
    return f;
  }
};

struct Places {
  uint32_t low[8], high[8];  // of the step: in bits 0 to 2, in bit 31
  static Places load(const uint8_t* p) {
    Places at;
    memcpy(at.low, p, sizeof at.low);
    memcpy(at.high, p, sizeof at.high);
    return at;
  }
  Places next() const {
    Places at;
    for (int i = 0; i < 8; ++i) {
      at.low[i] = low[i] >> 3;
      at.high[i] = high[i] << 1;
    }
    return at;
  }
};

struct Window {
  const float* x;
  explicit Window(const float* p) : x(p) {}
  Eight pick(const Places& at) const {
    Eight f;
    for (int i = 0; i < 8; ++i) f.v[i] = x[(at.low[i] & 7) + (at.high[i] >> 31 << 3)];
    return f;
  }
};

inline void transpose8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t j = 0; j < 8; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

template <class T>
struct Four {
  using Value = T;
  static constexpr int kCount = 4;
  const T* p;
  explicit Four(const T* from) : p(from) {}
  template <int kLane>
  float at() const {
    return Lanes::widened(p[kLane]);
  }
};

}  // namespace

#include "kernels.inl"
#include "panels.inl"
#include "sell16.inl"
#include "sell4.inl"
#include "sell8.inl"
#include "slices_scalar.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

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

template <class T>
void bitmap_of(const FewArgs& a) {
  switch (a.rows) {
    case 1: return bitmap_rows<Lanes, 1, T>(a);
    case 2: return bitmap_rows<Lanes, 2, T>(a);
    case 3: return bitmap_rows<Lanes, 3, T>(a);
    default: return bitmap_rows<Lanes, 4, T>(a);
  }
}
void bitmap(const FewArgs& a) { bitmap_of<float>(a); }
void bitmap_bf16(const FewArgs& a) { bitmap_of<uint16_t>(a); }

template <int kVecs>
void panels_of(const PanelArgs& a) {
  return a.pack.value16 == nullptr ? panel_lanes<kVecs, 1, Four<float>>(a) : panel_lanes<kVecs, 1, Four<uint16_t>>(a);
}
void panels(const PanelArgs& a) {
  switch (a.lanes) {
    case 8: return panels_of<8>(a);
    case 16: return panels_of<16>(a);
    default: return panels_of<32>(a);
  }
}

void block_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return block_panel_of<8>(a);
    case 16: return block_panel_of<16>(a);
    case 32: return block_panel_of<32>(a);
    default: return block_panel_of<64>(a);
  }
}

void nm_panel(const TileArgs& a) {
  switch (a.lanes) {
    case 8: return nm_panel_of<8>(a);
    case 16: return nm_panel_of<16>(a);
    case 32: return nm_panel_of<32>(a);
    default: return nm_panel_of<64>(a);
  }
}

}  // namespace

const Kernels fs::sparse_matmul::kScalar = {"scalar",
                                            fs::isa::Level::scalar,
                                            fs::isa::kLevelScalar,
                                            &bitmap,
                                            &bitmap_bf16,
                                            &sell16,
                                            &sell8,
                                            &sell4,
                                            &panels,
                                            &transpose,
                                            &finish,
                                            &finish_columns,
                                            &sample_block,
                                            &activation_grad_block,
                                            &block_slices,
                                            &block_panel,
                                            &nm_slices,
                                            &nm_panel};
