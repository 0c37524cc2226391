// sell4. Before this, kernels.inl, and from the level, of 8 lanes:
//   Eight          zero(), load(p), store(p), fma(w, x, s): s + w * x
//   Places         load(p): the places of 8 lanes in the window, for the steps of a group; next(): from the next step
//   on Window(x)      16 x; pick(places): of each lane the one that stands at its place

namespace {

// The sums of 16 outputs for kRows rows of x.
template <int kRows>
struct Sell4Sums {
  Sell4Sums<kRows - 1> above;
  Eight a, b;
};
template <>
struct Sell4Sums<0> {};

inline void clear(Sell4Sums<0>&) {}
template <int kRows>
inline void clear(Sell4Sums<kRows>& s) {
  clear(s.above);
  s.a = s.b = Eight::zero();
}

inline void add_step(Sell4Sums<0>&, const float*, const Places&, const Places&, const float*, int64_t) {}
template <int kRows>
__attribute__((always_inline)) inline void add_step(Sell4Sums<kRows>& s, const float* value, const Places& a,
                                                    const Places& b, const float* x, int64_t stride) {
  add_step(s.above, value, a, b, x, stride);
  const Window window(x + (kRows - 1) * stride);
  s.a = Eight::fma(Eight::load(value), window.pick(a), s.a);
  s.b = Eight::fma(Eight::load(value + 8), window.pick(b), s.b);
}

inline void scatter(const Sell4Sums<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const Sell4Sums<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[kSell4Rows];
  s.a.store(lanes);
  s.b.store(lanes + 8);
  scatter_lanes<kSell4Rows>(lanes, row, n, y + (kRows - 1) * stride);
}

// Nothing is asked for ahead: it costs 5% from L2 and up to 15% from L3, and brings nothing from DRAM (Zen 4).
template <int kRows>
void sell4_rows(const FewArgs& args) {
  const Pack& p = args.pack;
  for (int64_t slice = args.begin; slice < args.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    Sell4Sums<kRows> sums;
    clear(sums);
    for (int64_t g = begin; g < end; ++g) {
      const uint8_t* const group = p.group + g * kSell4GroupBytes;
      const uint16_t* const base = p.base + g * kSell4Steps;
      const float* const value = reinterpret_cast<const float*>(group + kSell4PlaceBytes);
      Places a = Places::load(group), b = Places::load(group + 32);
#pragma GCC unroll 8
      for (int64_t step = 0; step < kSell4Steps; ++step, a = a.next(), b = b.next())
        add_step(sums, value + step * kSell4Rows, a, b, args.x + base[step], args.x_stride);
    }
    scatter(sums, p.row + slice * kSell4Rows, p.n, args.y, args.y_stride);
  }
}

void sell4(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell4_rows<1>(a);
    case 2: return sell4_rows<2>(a);
    case 3: return sell4_rows<3>(a);
    default: return sell4_rows<4>(a);
  }
}

}  // namespace
