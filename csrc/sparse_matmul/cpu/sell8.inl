// sell8 for the levels that put x together from scalar loads. Before this, kernels.inl and Quad, four lanes:
//   zero()                       all lanes 0
//   load(p), store(p)            4 floats
//   of(x, a, b, c, d)            x[a], x[b], x[c], x[d]
//   of_bf16(p, high)             the low or the high halves of 4 dwords, widened
//   fma(w, x, s)                 s += w * x
// The four steps of a group are taken at once for four lanes: their sixteen indices are four words.

namespace {

// The sums of 16 lanes for kRows rows of x.
template <int kRows>
struct SellPart {
  SellPart<kRows - 1> above;
  Quad a, b, c, d;
};
template <>
struct SellPart<0> {};

inline void clear(SellPart<0>&) {}
template <int kRows>
inline void clear(SellPart<kRows>& s) {
  clear(s.above);
  s.a = s.b = s.c = s.d = Quad::zero();
}

// The values of lanes [lane, lane + 4) of a step, lane a multiple of 4.
inline Quad sell8_values(const float* step, int64_t lane) { return Quad::load(step + lane); }
inline Quad sell8_values(const uint16_t* step, int64_t lane) {
  return Quad::of_bf16(step + lane / 32 * 32 + lane % 16 * 2, lane / 16 % 2 != 0);
}

// A group of a slice of `lanes` for lanes [lane, lane + 4), whose indices these are.
template <class T>
__attribute__((always_inline)) inline Quad add_four(Quad sum, const T* value, int64_t lanes, int64_t lane,
                                                    const uint8_t* index, const float* x, const uint16_t* base) {
  uint32_t a, b, c, d;
  memcpy(&a, index, 4);
  memcpy(&b, index + 4, 4);
  memcpy(&c, index + 8, 4);
  memcpy(&d, index + 12, 4);
  sum = Quad::fma(sell8_values(value, lane), Quad::of(sell_x(x, base[0]), a & 255, b & 255, c & 255, d & 255), sum);
  sum = Quad::fma(sell8_values(value + lanes, lane),
                  Quad::of(sell_x(x, base[1]), a >> 8 & 255, b >> 8 & 255, c >> 8 & 255, d >> 8 & 255), sum);
  sum = Quad::fma(sell8_values(value + 2 * lanes, lane),
                  Quad::of(sell_x(x, base[2]), a >> 16 & 255, b >> 16 & 255, c >> 16 & 255, d >> 16 & 255), sum);
  return Quad::fma(sell8_values(value + 3 * lanes, lane),
                   Quad::of(sell_x(x, base[3]), a >> 24, b >> 24, c >> 24, d >> 24), sum);
}

template <class T>
inline void add_group(SellPart<0>&, const T*, int64_t, int64_t, const uint8_t*, const float*, int64_t,
                      const uint16_t*) {}
template <class T, int kRows>
__attribute__((always_inline)) inline void add_group(SellPart<kRows>& s, const T* value, int64_t lanes, int64_t lane,
                                                     const uint8_t* index, const float* x, int64_t stride,
                                                     const uint16_t* base) {
  add_group(s.above, value, lanes, lane, index, x, stride, base);
  const float* const row = x + (kRows - 1) * stride;
  s.a = add_four(s.a, value, lanes, lane, index, row, base);
  s.b = add_four(s.b, value, lanes, lane + 4, index + 16, row, base);
  s.c = add_four(s.c, value, lanes, lane + 8, index + 32, row, base);
  s.d = add_four(s.d, value, lanes, lane + 12, index + 48, row, base);
}

inline void scatter(const SellPart<0>&, const uint32_t*, int64_t, float*, int64_t) {}
template <int kRows>
inline void scatter(const SellPart<kRows>& s, const uint32_t* row, int64_t n, float* y, int64_t stride) {
  scatter(s.above, row, n, y, stride);
  float lanes[16];
  s.a.store(lanes);
  s.b.store(lanes + 4);
  s.c.store(lanes + 8);
  s.d.store(lanes + 12);
  scatter_lanes<16>(lanes, row, n, y + (kRows - 1) * stride);
}

template <class T, int kRows>
void sell8_rows(const FewArgs& a) {
  const Pack& p = a.pack;
  const int64_t lanes = p.block;
  for (int64_t slice = a.begin; slice < a.end; ++slice) {
    const int64_t begin = at_most(p.offset[slice], p.total), end = at_most(p.offset[slice + 1], p.total);
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      SellPart<kRows> sums;
      clear(sums);
      for (int64_t g = begin; g < end; ++g) {
        const uint8_t* const group = p.group + g * sell8_group_bytes(lanes, sizeof(T));
        add_group(sums, reinterpret_cast<const T*>(group + kSell8Steps * lanes), lanes, lane,
                  group + lane * kSell8Steps, a.x, a.x_stride, p.base + g * kSell8Steps);
      }
      scatter(sums, p.row + slice * lanes + lane, p.n, a.y, a.y_stride);
    }
  }
}

template <class T>
void sell8_of(const FewArgs& a) {
  switch (a.rows) {
    case 1: return sell8_rows<T, 1>(a);
    case 2: return sell8_rows<T, 2>(a);
    case 3: return sell8_rows<T, 3>(a);
    default: return sell8_rows<T, 4>(a);
  }
}

void sell8(const FewArgs& a) {
  if (a.pack.bf16) return sell8_of<uint16_t>(a);
  sell8_of<float>(a);
}

}  // namespace
