// sell16. Before this: kernels.inl, and Quad, four lanes (sell8.inl).

namespace {

constexpr int64_t kSell16Ahead = 4096;  // bytes

// The sums of 16 outputs for kRows rows of x.
template <int kRows>
struct Sell16Sums {
  Sell16Sums<kRows - 1> above;
  Quad a, b, c, d;
};
template <>
struct Sell16Sums<0> {};

inline void clear(Sell16Sums<0>&) {}
template <int kRows>
inline void clear(Sell16Sums<kRows>& s) {
  clear(s.above);
  s.a = s.b = s.c = s.d = Quad::zero();
}

// The x of four lanes, whose indices are four u16.
inline Quad pick(const float* x, uint64_t k) {
  const auto low = static_cast<uint32_t>(k), high = static_cast<uint32_t>(k >> 32);
  return Quad::of(x, low & 0xffff, low >> 16, high & 0xffff, high >> 16);
}

// The indices of a step.
struct Sell16Index {
  uint64_t a, b, c, d;
};

inline void add_step(Sell16Sums<0>&, const float*, const Sell16Index&, const float*, int64_t) {}
template <int kRows>
inline void add_step(Sell16Sums<kRows>& s, const float* value, const Sell16Index& i, const float* x, int64_t stride) {
  add_step(s.above, value, i, x, stride);
  const float* const row = x + (kRows - 1) * stride;
  s.a = Quad::fma(Quad::load(value), pick(row, i.a), s.a);
  s.b = Quad::fma(Quad::load(value + 4), pick(row, i.b), s.b);
  s.c = Quad::fma(Quad::load(value + 8), pick(row, i.c), s.c);
  s.d = Quad::fma(Quad::load(value + 12), pick(row, i.d), s.d);
}

inline void scatter(const Sell16Sums<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const Sell16Sums<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSell16Rows];
  s.a.store(lanes);
  s.b.store(lanes + 4);
  s.c.store(lanes + 8);
  s.d.store(lanes + 12);
  scatter_lanes<kSell16Rows>(lanes, row, n, y + (kRows - 1) * stride);
}

// One load each: a copy of all 32 bytes would go through the stack.
inline uint64_t load8(const uint8_t* p) {
  uint64_t q;
  memcpy(&q, p, sizeof q);
  return q;
}

template <int kRows>
void sell16_rows(const FewArgs& a) {
  const Pack& p = a.pack;
  for (int64_t slice = a.begin; slice < a.end; ++slice) {
    const uint8_t* step = p.step + at_most(p.offset[slice], p.total) * kSell16StepBytes;
    const uint8_t* const end = p.step + at_most(p.offset[slice + 1], p.total) * kSell16StepBytes;
    Sell16Sums<kRows> sums;
    clear(sums);
    for (; step < end; step += kSell16StepBytes) {
      __builtin_prefetch(step + kSell16Ahead);
      __builtin_prefetch(step + kSell16Ahead + 64);
      const Sell16Index index{load8(step + 64), load8(step + 72), load8(step + 80), load8(step + 88)};
      add_step(sums, reinterpret_cast<const float*>(step), index, a.x, a.x_stride);
    }
    scatter(sums, p.row + slice * kSell16Rows, p.n, a.y, a.y_stride);
  }
}

void sell16(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell16_rows<1>(a);
    case 2: return sell16_rows<2>(a);
    default: return sell16_rows<3>(a);
  }
}

}  // namespace
