// The rows of kl_loss.h, one body for every level; the level brings simd/<level>.h before this.
#include <float.h>
#include <string.h>

#include "../kl_loss.h"

namespace {

using namespace fs::kl_loss;
using S = Simd;
using F = Simd::F;

constexpr int kVecs = kLanes / S::kWidth;  // a group of kLanes logits is so many vectors
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// N vectors with names of their own, through nested structs: gcc 12 spills an array of them. What works on them is
// inlined by force: gcc 12 would call it, with the vectors in memory.
#if defined(__SANITIZE_ADDRESS__)
#define FS_INLINE inline  // instrumented code inlined by force takes gcc 12 many minutes
#else
#define FS_INLINE __attribute__((always_inline)) inline
#endif
template <int N>
struct Vecs {
  Vecs<N - 1> rest;
  F last;
};
template <>
struct Vecs<0> {};

template <int N, class T>
FS_INLINE Vecs<N> load(const T* p) {
  if constexpr (N == 0)
    return {};
  else
    return {load<N - 1>(p), S::load(p + (N - 1) * S::kWidth)};
}
template <int N>
FS_INLINE void store(float* p, const Vecs<N>& x) {
  if constexpr (N > 0) {
    store(p, x.rest);
    S::store(p + (N - 1) * S::kWidth, x.last);
  }
}
template <int N>
FS_INLINE Vecs<N> zero() {
  if constexpr (N == 0)
    return {};
  else
    return {zero<N - 1>(), S::set1(0.0f)};
}
// f of every vector, or of the vectors at the same place.
template <class Fn, int N, class... More>
FS_INLINE Vecs<N> each(Fn f, const Vecs<N>& x, const More&... more) {
  if constexpr (N == 0)
    return {};
  else
    return {each(f, x.rest, more.rest...), f(x.last, more.last...)};
}

constexpr auto add = [](F a, F b) { return S::add(a, b); };
FS_INLINE F minus_inf() { return S::set1(-__builtin_inff()); }

constexpr float kRound = 12582912.0f + 127.0f;  // x + kRound is whole, and its low bits are the exponent of 2^x
constexpr float kByPlain = 1.44269504f;         // `by` at temperature 1

// Exponentials of logits x: 2^((x - max) * by).
struct Exponential {
  F max;
  F by;  // log2(e) / temperature, rounded once: everything is computed at the temperature that this stands for
  Exponential(float max, float by) : max(S::set1(max)), by(S::set1(by)) {}
};

// 2^r for r in [-0.5, 0.5], degree 5, 9e-8 relative.
template <int N>
FS_INLINE Vecs<N> exp2_small(const Vecs<N>& r) {
  Vecs<N> p = each([&](F x) { return S::fma(S::set1(1.326468e-3f), x, S::set1(9.671508e-3f)); }, r);
  p = each([&](F p, F x) { return S::fma(p, x, S::set1(5.550734e-2f)); }, p, r);
  p = each([&](F p, F x) { return S::fma(p, x, S::set1(2.4022242e-1f)); }, p, r);
  p = each([&](F p, F x) { return S::fma(p, x, S::set1(6.9314698e-1f)); }, p, r);
  return each([&](F p, F x) { return S::fma(p, x, S::set1(1.0f)); }, p, r);
}

// d = x - max, of a chunk that is near(): nothing is clamped or masked. A NaN stays.
template <int N>
FS_INLINE Vecs<N> exp_near(const Vecs<N>& d, F by) {
  const F round = S::set1(kRound);
  const Vecs<N> y = each([&](F d) { return S::fma(d, by, round); }, d);
  const Vecs<N> minus = each([&](F y) { return S::sub(round, y); }, y);
  const Vecs<N> r = each([&](F d, F m) { return S::fma(d, by, m); }, d, minus);
  const Vecs<N> p = exp2_small(r);
  return each([&](F p, F y) { return S::mul(p, S::low_bits_to_exponent(y)); }, p, y);
}
// Every power from min up is above -125.
inline bool near(float min, float max, float by) {
  return (static_cast<double>(min) - static_cast<double>(max)) * static_cast<double>(by) >= -124.0;
}

// Any x: the power is held at -125, so that what is finite stays above 0 (and no denormal is made); 0 for -inf. NaN
// stays.
FS_INLINE F exp_any(F x, const Exponential& c) {
  const F power = S::mul(S::sub(x, c.max), c.by);
  const F held = S::max(S::set1(-125.0f), power);
  const F y = S::add(held, S::set1(kRound));
  const Vecs<1> p = exp2_small(Vecs<1>{{}, S::sub(held, S::sub(y, S::set1(kRound)))});
  return S::zero_where_equal(power, minus_inf(), S::mul(p.last, S::low_bits_to_exponent(y)));
}

inline void fill_minus_inf(float* p) { *p = -__builtin_inff(); }
inline void fill_minus_inf(fs::bf16* p) { p->bits = 0xff80; }
inline void fill_minus_inf(fs::f16* p) { p->bits = 0xfc00; }

// The last, short group of a row: behind its n logits come masked ones, which change nothing.
template <class T>
struct Padded {
  T v[kLanes];
  Padded(const T* p, int64_t n) {
    for (int i = 0; i < kLanes; ++i) fill_minus_inf(v + i);
    memcpy(v, p, static_cast<size_t>(n) * sizeof(T));
  }
};

// A float copy of a group of logits, masked behind the n of them that there are.
template <class T>
inline void copy_group(const T* p, int64_t n, float* to) {
  const Padded<T> group(p, n);
  for (int at = 0; at < kLanes; at += S::kWidth) S::store(to + at, S::load(group.v + at));
}

// What a row's exponentials are computed with: those of the student, the teacher, the student at temperature 1.
struct Scale {
  Exponential s, t, one;
  Scale(float s_max, float t_max, float by) : s(s_max, by), t(t_max, by), one(s_max, kByPlain) {}
};

// Sums of a chunk, lane by lane.
struct Lanes {
  Vecs<kVecs> z_s = zero<kVecs>(), z_t = zero<kVecs>(), z_1 = zero<kVecs>(), w = zero<kVecs>();
};

// The lanes' sum in double, in the order of the lanes: the same on every level.
inline double flush(const Vecs<kVecs>& lanes) {
  float f[kLanes];
  store(f, lanes);
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(f[i]);
  return sum;
}

// The exponentials of n logits, a multiple of kLanes. Their sum is a loop of its own: the registers of two groups leave
// none for it.
inline void exps_near(const float* x, int64_t n, const Exponential& c, float* out) {
  const auto exps = [c](const auto& x) { return exp_near(each([c](F x) { return S::sub(x, c.max); }, x), c.by); };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)  // two groups at once hide the latency of fma
    store(out + i, exps(load<2 * kVecs>(x + i)));
  if (i < n) store(out + i, exps(load<kVecs>(x + i)));
}
inline void sum(const float* x, int64_t n, Vecs<kVecs>& lanes) {
  Vecs<kVecs> z = lanes;
  for (int64_t i = 0; i < n; i += kLanes) z = each(add, z, load<kVecs>(x + i));
  lanes = z;
}

// The teacher's exponentials (out may be null), their sum and w: sum of e_t * (log p_t - log p_s) but for what the
// normalizers add.
inline void weigh_near(const float* s, const float* t, int64_t n, const Scale& scale, Lanes& lanes, float* out) {
  const F s_max = scale.s.max, t_max = scale.t.max, by = scale.t.by;
  Vecs<kVecs> z = lanes.z_t, w = lanes.w;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vecs<kVecs> d_s = each([&](F x) { return S::sub(x, s_max); }, load<kVecs>(s + i));
    const Vecs<kVecs> d_t = each([&](F x) { return S::sub(x, t_max); }, load<kVecs>(t + i));
    const Vecs<kVecs> e = exp_near(d_t, by);
    z = each(add, z, e);
    w = each([&](F w, F e, F d_s, F d_t) { return S::fma(e, S::sub(d_t, d_s), w); }, w, e, d_s, d_t);
    if (out != nullptr) store(out + i, e);
  }
  lanes.z_t = z;
  lanes.w = w;
}

// The same for a group of kLanes logits of any kind.
template <bool kThree>
inline void add_any(const float* s, const float* t, const Scale& c, Lanes& l, float* kept, int64_t stride) {
  const Vecs<kVecs> x_s = load<kVecs>(s), x_t = load<kVecs>(t);
  const Vecs<kVecs> e_s = each([&](F x) { return exp_any(x, c.s); }, x_s);
  const Vecs<kVecs> e_t = each([&](F x) { return exp_any(x, c.t); }, x_t);
  l.z_s = each(add, l.z_s, e_s);
  l.z_t = each(add, l.z_t, e_t);
  const auto weigh = [&](F w, F e, F x_s, F x_t) {
    const F d_t = S::sub(x_t, c.t.max);
    return S::fma(e, S::zero_where_equal(d_t, minus_inf(), S::sub(d_t, S::sub(x_s, c.s.max))), w);
  };
  l.w = each(weigh, l.w, e_t, x_s, x_t);
  if (kept != nullptr) {
    store(kept, e_s);
    store(kept + stride, e_t);
  }
  if constexpr (kThree) {
    const Vecs<kVecs> e_1 = each([&](F x) { return exp_any(x, c.one); }, x_s);
    l.z_1 = each(add, l.z_1, e_1);
    if (kept != nullptr) store(kept + 2 * stride, e_1);
  }
}

// A NaN is passed over: it comes through the exponentials.
struct Range {
  F max, min;
};
template <class T>
FS_INLINE void add_range(const T* x, Range& r, float* wide) {
  for (int at = 0; at < kLanes; at += S::kWidth) {
    const F v = S::load(x + at);
    r.max = S::max(v, r.max);
    r.min = S::min(v, r.min);
    if (wide != nullptr) S::store(wide + at, v);
  }
}
inline float min_across(F x) { return -S::max_across(S::sub(S::set1(0.0f), x)); }

// The running state of a row.
struct RowState {
  float s_max = -FLT_MAX, t_max = -FLT_MAX;  // not -inf: a chunk may be masked as a whole
  double z_s = 0, z_t = 0, z_1 = 0, w = 0;
};

// 2^x for a rescale; never 0, which times an infinite sum would be NaN.
inline double shrink(double x) {
  const double e = __builtin_exp2(x);
  return e < 1e-300 ? 1e-300 : e;
}

// Logits that are not float are made so once, where a chunk is first read.
template <class T>
struct Wide {
  float s[kChunk], t[kChunk];
};
template <>
struct Wide<float> {};

template <bool kThree, class T>
void add_chunk(RowState& row, const T* s, const T* t, int64_t n, float by, float* kept, int64_t stride) {
  constexpr bool kCopied = sizeof(T) != sizeof(float);
  const int64_t whole = n / kLanes * kLanes;
  float s_rest[kLanes], t_rest[kLanes];
  copy_group(s + whole, n - whole, s_rest);
  copy_group(t + whole, n - whole, t_rest);
  Wide<T> wide;
  const float *s_whole, *t_whole;
  float *s_copy = nullptr, *t_copy = nullptr;
  if constexpr (kCopied) {
    s_whole = s_copy = wide.s;
    t_whole = t_copy = wide.t;
  } else {
    s_whole = s;
    t_whole = t;
  }
  Range r_s{S::set1(row.s_max), S::set1(FLT_MAX)}, r_t{S::set1(row.t_max), S::set1(FLT_MAX)};
  for (int64_t i = 0; i < whole; i += kLanes) {
    constexpr int64_t kNext = kChunk, kFar = 4 * kChunk;  // to L1 and L2; beyond the end a prefetch does nothing
    __builtin_prefetch(s + i + kNext, 0, 3);
    __builtin_prefetch(t + i + kNext, 0, 3);
    __builtin_prefetch(s + i + kFar, 0, 2);
    __builtin_prefetch(t + i + kFar, 0, 2);
    add_range(s + i, r_s, kCopied ? s_copy + i : nullptr);
    add_range(t + i, r_t, kCopied ? t_copy + i : nullptr);
  }
  const float s_min = min_across(r_s.min), t_min = min_across(r_t.min);
  add_range(s_rest, r_s, nullptr);  // what is behind it is masked and no maximum
  add_range(t_rest, r_t, nullptr);
  const float s_max = S::max_across(r_s.max), t_max = S::max_across(r_t.max);
  if (s_max != row.s_max || t_max != row.t_max) {
    const double up_s = static_cast<double>(row.s_max) - static_cast<double>(s_max);
    const double up_t = static_cast<double>(row.t_max) - static_cast<double>(t_max);
    const double shrink_t = shrink(up_t * static_cast<double>(by));
    row.w = shrink_t * (row.w + row.z_t * (up_t - up_s));
    row.z_t *= shrink_t;
    row.z_s *= shrink(up_s * static_cast<double>(by));
    row.z_1 *= shrink(up_s * static_cast<double>(kByPlain));
    row.s_max = s_max;
    row.t_max = t_max;
  }
  const Scale now(s_max, t_max, by);
  Lanes lanes;
  if (near(s_min, s_max, by) && near(t_min, t_max, by) && (!kThree || near(s_min, s_max, kByPlain))) {
    float buffer[kChunk];
    float* e = kept == nullptr ? buffer : kept;
    exps_near(s_whole, whole, now.s, e);
    sum(e, whole, lanes.z_s);
    weigh_near(s_whole, t_whole, whole, now, lanes, kept == nullptr ? nullptr : kept + stride);
    if (kThree) {
      e = kept == nullptr ? buffer : kept + 2 * stride;
      exps_near(s_whole, whole, now.one, e);
      sum(e, whole, lanes.z_1);
    }
  } else {
    for (int64_t i = 0; i < whole; i += kLanes)
      add_any<kThree>(s_whole + i, t_whole + i, now, lanes, kept == nullptr ? nullptr : kept + i, stride);
  }
  if (whole < n) add_any<kThree>(s_rest, t_rest, now, lanes, kept == nullptr ? nullptr : kept + whole, stride);
  row.z_s += flush(lanes.z_s);
  row.z_t += flush(lanes.z_t);
  if (kThree) row.z_1 += flush(lanes.z_1);
  row.w += flush(lanes.w);
}

// The exponentials of one vector: read back, or computed again.
struct Exps {
  F s, t, one;
};
template <bool kThree, bool kKept, class T>
FS_INLINE Exps exps_at(const T* s, const T* t, const Scale& c, const float* kept, int64_t stride) {
  if constexpr (kKept) {
    return {S::load(kept), S::load(kept + stride), kThree ? S::load(kept + 2 * stride) : S::set1(0.0f)};
  } else {
    const F x = S::load(s);
    return {exp_any(x, c.s), exp_any(S::load(t), c.t), kThree ? exp_any(x, c.one) : S::set1(0.0f)};
  }
}

// Factors that make probabilities (or shares of the gradient) of a chunk's exponentials.
struct Factors {
  F s, t, one;
};

// Sums of the Bregman form, and of p_t d.
struct Bregman {
  F offset, minus_rest, inverse_temperature;  // d = (t - s - offset) / T + minus_rest
  Vecs<kVecs> kl = zero<kVecs>(), mean_d = zero<kVecs>();
};
// t - s is rounded to its own size, which may be far more than that of d (t a constant above s, say): what the rounding
// took is a float32 itself, and comes back once the offset is off.
FS_INLINE F bregman_d(F s, F t, const Bregman& b) {
  const F apart = S::sub(t, s), minus_s = S::sub(apart, t);
  const F taken = S::sub(S::sub(t, S::sub(apart, minus_s)), S::add(s, minus_s));
  const F small = S::fma(taken, b.inverse_temperature, b.minus_rest);
  return S::fma(S::sub(apart, b.offset), b.inverse_temperature, small);
}
// A group of terms. Near (|d| < 2) one is p_t d^2 P(d), P of degree 8 fitted to (e^-d - 1 + d) / d^2 (1e-7 relative),
// and has the error of p_t alone. Far apart the plain sum of the three parts is as precise (at |d| = 0.5 it would have
// 20 times that error); a class that the teacher masks is infinitely far and adds p_s.
FS_INLINE void add_bregman(Bregman& b, const Vecs<kVecs>& s, const Vecs<kVecs>& t, const Vecs<kVecs>& p_s,
                           const Vecs<kVecs>& p_t) {
  const Vecs<kVecs> d = each([&](F s, F t) { return bregman_d(s, t, b); }, s, t);
  const auto step = [&](const Vecs<kVecs>& series, float next) {
    return each([&](F x, F d) { return S::fma(x, d, S::set1(next)); }, series, d);
  };
  Vecs<kVecs> series = each([](F d) { return S::fma(S::set1(2.8162353e-7f), d, S::set1(-2.9843188e-6f)); }, d);
  series = step(series, 2.4847946e-5f);
  series = step(series, -1.9774109e-4f);
  series = step(series, 1.3886975e-3f);
  series = step(series, -8.334049e-3f);
  series = step(series, 4.1666847e-2f);
  series = step(series, -1.6666646e-1f);
  series = step(series, 0.49999997f);
  const Vecs<kVecs> weighted =
      each([](F p, F t, F d) { return S::mul(p, S::zero_where_equal(t, minus_inf(), d)); }, p_t, t, d);
  const Vecs<kVecs> near = each([](F w, F d, F x) { return S::mul(S::mul(w, d), x); }, weighted, d, series);
  const Vecs<kVecs> far = each([](F w, F p_s, F p_t) { return S::add(w, S::sub(p_s, p_t)); }, weighted, p_s, p_t);
  const auto choose = [](F d, F near, F far) { return S::select_negative(S::fma(d, d, S::set1(-4.0f)), near, far); };
  b.kl = each(add, b.kl, each(choose, d, near, far));
  b.mean_d = each(add, b.mean_d, weighted);
}

template <bool kThree>
FS_INLINE F grad_of(const Exps& e, const Factors& f) {  // not fused: equal logits must give exactly 0
  const F difference = S::sub(S::mul(e.s, f.s), S::mul(e.t, f.t));
  return kThree ? S::add(difference, S::mul(e.one, f.one)) : difference;
}

// One row. kThree: the cross-entropy needs exponentials of its own (T is not 1). T: type of the logits, G: of grad.
template <bool kThree, class T, class G>
struct Row {
  const RowsArgs& a;
  const T* s;
  const T* t;
  float by;
  int64_t stride;  // between the parts of kept
  RowState sums;
  float s_max_at[kMaxKeptChunks], t_max_at[kMaxKeptChunks];  // what each chunk's kept exponentials are relative to

  Row(const RowsArgs& a, int64_t row)
      : a(a),
        s(static_cast<const T*>(a.student) + row * a.student_stride),
        t(static_cast<const T*>(a.teacher) + row * a.teacher_stride),
        by(static_cast<float>(kLog2E / a.temperature)),
        stride((a.classes + kLanes - 1) / kLanes * kLanes) {}

  Scale scale() const { return Scale(sums.s_max, sums.t_max, by); }
  double per_logit() const { return static_cast<double>(by) * kLn2; }  // 1 / temperature

  void read() {
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const int64_t n = a.classes - i < kChunk ? a.classes - i : kChunk;
      add_chunk<kThree>(sums, s + i, t + i, n, by, a.kept == nullptr ? nullptr : a.kept + i, stride);
      if (a.kept != nullptr) {
        s_max_at[i / kChunk] = sums.s_max;
        t_max_at[i / kChunk] = sums.t_max;
      }
    }
  }

  double kl() const {
    // (max of t - max of s) / T cancels between w, which is relative to the maxima, and the two normalizers.
    const double kl = sums.w / sums.z_t * per_logit() - __builtin_log(sums.z_t) + __builtin_log(sums.z_s);
    return kl < kSmall ? small_kl() : kl;
  }

  // The double factors of chunk i: weight / z, and for kept exponentials the way from the chunk's maximum to the row's.
  Factors factors(int64_t chunk, double w_s, double w_t, double w_1) const {
    double up_s = 0, up_t = 0, up_1 = 0;
    if (a.kept != nullptr) {
      const double up = static_cast<double>(s_max_at[chunk]) - static_cast<double>(sums.s_max);
      up_s = up * static_cast<double>(by);
      up_1 = up * static_cast<double>(kByPlain);
      up_t = (static_cast<double>(t_max_at[chunk]) - static_cast<double>(sums.t_max)) * static_cast<double>(by);
    }
    const double z_1 = kThree ? sums.z_1 : 1.0;
    return {S::set1(static_cast<float>(__builtin_exp2(up_s) / sums.z_s * w_s)),
            S::set1(static_cast<float>(__builtin_exp2(up_t) / sums.z_t * w_t)),
            S::set1(static_cast<float>(__builtin_exp2(up_1) / z_1 * w_1))};
  }

  double small_kl() const { return a.kept != nullptr ? small_kl_of<true>() : small_kl_of<false>(); }

  template <bool kKept>
  double small_kl_of() const {
    const Scale c = scale();
    const double offset = (__builtin_log(sums.z_t) - __builtin_log(sums.z_s)) / per_logit() +
                          (static_cast<double>(sums.t_max) - static_cast<double>(sums.s_max));
    const float rounded = static_cast<float>(offset);
    const float minus_rest = static_cast<float>((static_cast<double>(rounded) - offset) * per_logit());
    double kl = 0, mean_d = 0;
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const Factors f = factors(i / kChunk, 1, 1, 0);
      const int64_t end = a.classes - i < kChunk ? a.classes : i + kChunk, whole = end / kLanes * kLanes;
      Bregman terms{S::set1(rounded), S::set1(minus_rest), S::set1(static_cast<float>(per_logit()))};
      const auto group = [&](const T* gs, const T* gt, int64_t j) __attribute__((always_inline)) {
        const Vecs<kVecs> x_s = load<kVecs>(gs), x_t = load<kVecs>(gt);
        Vecs<kVecs> e_s, e_t;
        if constexpr (kKept) {
          e_s = load<kVecs>(a.kept + j);
          e_t = load<kVecs>(a.kept + stride + j);
        } else {
          e_s = each([&](F x) { return exp_any(x, c.s); }, x_s);
          e_t = each([&](F x) { return exp_any(x, c.t); }, x_t);
        }
        add_bregman(terms, x_s, x_t, each([&](F e) { return S::mul(e, f.s); }, e_s),
                    each([&](F e) { return S::mul(e, f.t); }, e_t));
      };
      for (int64_t j = i; j < whole; j += kLanes) group(s + j, t + j, j);
      if (whole < end) {
        const Padded<T> s_rest(s + whole, end - whole), t_rest(t + whole, end - whole);
        group(s_rest.v, t_rest.v, whole);
      }
      kl += flush(terms.kl);
      mean_d += flush(terms.mean_d);
    }
    // The rounding of the offset moves every d by mean_d - kl (which is sum p_t (1 - e^-d)), and kl by half its square.
    const double moved = mean_d - kl;
    kl -= 0.5 * moved * moved;
    return kl < 0 ? 0 : kl;
  }

  template <bool kKept, bool kStream>
  void write_grad(G* grad, int64_t target, double w_s, double w_t, double w_1) const {
    const Scale c = scale();
    const double weight_of_target = a.target == nullptr ? 0 : a.ce_weight;
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const Factors f = factors(i / kChunk, w_s, w_t, w_1);
      const int64_t end = a.classes - i < kChunk ? a.classes : i + kChunk;
      const auto value = [&](int64_t j) {
        return grad_of<kThree>(exps_at<kThree, kKept>(s + j, t + j, c, kKept ? a.kept + j : nullptr, stride), f);
      };
      // n < kWidth of them, from j on; what lies beyond a row is not read.
      const auto few = [&](int64_t j, int64_t n) {
        if (n <= 0) return;
        const Padded<T> gs(s + j, n), gt(t + j, n);
        float kept[3 * kLanes] = {};
        if constexpr (kKept)
          for (int part = 0; part < (kThree ? 3 : 2); ++part)
            memcpy(kept + part * kLanes, a.kept + part * stride + j, static_cast<size_t>(n) * sizeof(float));
        S::store_n(grad + j, grad_of<kThree>(exps_at<kThree, kKept>(gs.v, gt.v, c, kept, kLanes), f),
                   static_cast<int>(n));
      };
      int64_t j = i;
      if constexpr (kStream) {  // up to where a vector is aligned
        const int64_t bytes = S::kWidth * static_cast<int64_t>(sizeof(G));
        const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad + j) % static_cast<uintptr_t>(bytes));
        const int64_t head = off == 0 ? 0 : (bytes - off) / static_cast<int64_t>(sizeof(G));
        few(j, head < end - j ? head : end - j);
        j += head;
      }
      for (; j + S::kWidth <= end; j += S::kWidth) {
        if constexpr (kStream)
          S::stream(grad + j, value(j));
        else
          S::store(grad + j, value(j));
      }
      few(j, end - j);
      if (target >= i && target < end) {
        const Padded<T> gs(s + target, 1), gt(t + target, 1);
        float kept[3 * kLanes] = {}, got[kLanes];
        if constexpr (kKept)
          for (int part = 0; part < (kThree ? 3 : 2); ++part) kept[part * kLanes] = a.kept[part * stride + target];
        const F g = grad_of<kThree>(exps_at<kThree, kKept>(gs.v, gt.v, c, kept, kLanes), f);
        S::store(got, S::sub(g, S::set1(static_cast<float>(weight_of_target))));
        G rounded[kLanes];
        S::store(rounded, S::load(got));
        grad[target] = rounded[0];
      }
    }
  }

  void write_grad(G* grad, int64_t target) const {
    const double w_ce = a.target == nullptr ? 0 : a.ce_weight;
    // At temperature 1 the two softmaxes of the student are one.
    const double w_s = a.kl_weight + (kThree ? 0 : w_ce), w_t = a.kl_weight, w_1 = kThree ? w_ce : 0;
    if (a.kept != nullptr)
      a.stream ? write_grad<true, true>(grad, target, w_s, w_t, w_1)
               : write_grad<true, false>(grad, target, w_s, w_t, w_1);
    else
      a.stream ? write_grad<false, true>(grad, target, w_s, w_t, w_1)
               : write_grad<false, false>(grad, target, w_s, w_t, w_1);
  }

  double ce(int64_t target) const {
    float logit[kLanes];
    copy_group(s + target, 1, logit);
    return __builtin_log(kThree ? sums.z_1 : sums.z_s) +
           (static_cast<double>(sums.s_max) - static_cast<double>(logit[0])) * static_cast<double>(kByPlain) * kLn2;
  }
};

template <bool kThree, class T, class G>
void rows_of(const RowsArgs& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    G* grad = a.grad == nullptr ? nullptr : static_cast<G*>(a.grad) + r * a.classes;
    const int64_t target = a.target == nullptr ? -1 : a.target[r];
    if (a.target != nullptr && target == a.ignore_index) {
      a.kl[r] = a.ce[r] = 0;
      if (grad != nullptr) memset(grad, 0, static_cast<size_t>(a.classes) * sizeof(G));
      continue;
    }
    Row<kThree, T, G> row(a, r);
    row.read();
    a.kl[r] = row.kl();
    if (a.target != nullptr) a.ce[r] = row.ce(target);
    if (grad != nullptr) row.write_grad(grad, target);
  }
  if (a.stream) S::stream_end();
}

template <class T, class G>
void rows_as(const RowsArgs& a) {
  if (a.target != nullptr && a.temperature != 1.0)
    rows_of<true, T, G>(a);
  else
    rows_of<false, T, G>(a);
}

void rows(const RowsArgs& a) {
  switch (a.dtype) {
    case DType::f32: return rows_as<float, float>(a);
    case DType::bf16: return rows_as<fs::bf16, fs::bf16>(a);
    case DType::f16: return rows_as<fs::f16, float>(a);
  }
}

}  // namespace
