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
#include "slices_scalar.inl"
// Behind these two:
#include "blocks.inl"
#include "nm.inl"

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

const Kernels fs::sparse_matmul::kScalar = {
    "scalar", fs::isa::Level::scalar, fs::isa::kLevelScalar, &bitmap,    &sell,    &panels, &transpose,
    &finish,  &block_slices,          &block_panel,          &nm_slices, &nm_panel};
