// The rows of kl_loss.h, one body for every level; the level brings simd/<level>.h before this.
#include <float.h>
#include <string.h>

#include "../kl_loss.h"

namespace {

using namespace fs::kl_loss;
using S = Simd;
using F = Simd::F;

constexpr int kVecs = kLanes / S::kWidth;  // a group of kLanes logits is so many vectors

// 2^x for x <= 0 and 0 for -inf; x is held at -125, so that what is finite stays above 0 (and no denormal is made).
// x + bias rounds x to a whole number whose low bits are the exponent; degree 5 on [-0.5, 0.5], 9e-8 relative. NaN
// stays. Inlined by force, as what calls it: gcc 12 would call it, with the sums in memory.
__attribute__((always_inline)) inline F exp2_nonpositive(F x) {
  const F bias = S::set1(12582912.0f + 127.0f);
  const F held = S::max(S::set1(-125.0f), x);
  const F y = S::add(held, bias);
  const F r = S::sub(held, S::sub(y, bias));
  F p = S::set1(1.326468e-3f);
  p = S::fma(p, r, S::set1(9.671508e-3f));
  p = S::fma(p, r, S::set1(5.550734e-2f));
  p = S::fma(p, r, S::set1(2.4022242e-1f));
  p = S::fma(p, r, S::set1(6.9314698e-1f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::zero_where_equal(x, S::set1(-__builtin_inff()), S::mul(p, S::low_bits_to_exponent(y)));
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

// What a chunk or a row is computed with.
struct Scale {
  F s_max, t_max;    // of the logits so far
  F by_temperature;  // log2(e) / T
  F plain;           // log2(e)
};

inline F exp_at(F shifted, F by) { return exp2_nonpositive(S::mul(shifted, by)); }

// Sums of a chunk, lane by lane, named through nested structs: gcc 12 spills an array of them.
template <int kCount>
struct Lanes {
  Lanes<kCount - 1> rest;
  F z_s, z_t, z_1, w;
};
template <>
struct Lanes<0> {};

inline void clear(Lanes<0>&) {}
template <int kCount>
inline void clear(Lanes<kCount>& l) {
  clear(l.rest);
  l.z_s = l.z_t = l.z_1 = l.w = S::set1(0.0f);
}

template <bool kThree, class T>
inline void add_group(Lanes<0>&, const T*, const T*, const Scale&, float*, int64_t) {}
// kThree: also the exponentials of temperature 1. kept (or null): where the group's exponentials go, stride apart.
template <bool kThree, class T, int kCount>
__attribute__((always_inline)) inline void add_group(Lanes<kCount>& l, const T* s, const T* t, const Scale& c,
                                                     float* kept, int64_t stride) {
  add_group<kThree>(l.rest, s, t, c, kept, stride);
  constexpr int at = (kCount - 1) * S::kWidth;
  const F ds = S::sub(S::load(s + at), c.s_max), dt = S::sub(S::load(t + at), c.t_max);
  const F e_s = exp_at(ds, c.by_temperature), e_t = exp_at(dt, c.by_temperature);
  l.z_s = S::add(l.z_s, e_s);
  l.z_t = S::add(l.z_t, e_t);
  l.w = S::fma(e_t, S::zero_where_equal(dt, S::set1(-__builtin_inff()), S::sub(dt, ds)), l.w);
  if (kept != nullptr) {
    S::store(kept + at, e_s);
    S::store(kept + stride + at, e_t);
  }
  if constexpr (kThree) {
    const F e_1 = exp_at(ds, c.plain);
    l.z_1 = S::add(l.z_1, e_1);
    if (kept != nullptr) S::store(kept + 2 * stride + at, e_1);
  }
}

// The lanes' sums in double, in the order of the lanes: the same on every level.
struct ChunkSums {
  double z_s = 0, z_t = 0, z_1 = 0, w = 0;
};
struct Flushed {
  float z_s[kLanes], z_t[kLanes], z_1[kLanes], w[kLanes];
};
inline void store(const Lanes<0>&, Flushed&) {}
template <int kCount>
inline void store(const Lanes<kCount>& l, Flushed& f) {
  store(l.rest, f);
  constexpr int at = (kCount - 1) * S::kWidth;
  S::store(f.z_s + at, l.z_s);
  S::store(f.z_t + at, l.z_t);
  S::store(f.z_1 + at, l.z_1);
  S::store(f.w + at, l.w);
}
inline ChunkSums flush(const Lanes<kVecs>& l) {
  Flushed f;
  store(l, f);
  ChunkSums sums;
  for (int i = 0; i < kLanes; ++i) {
    sums.z_s += static_cast<double>(f.z_s[i]);
    sums.z_t += static_cast<double>(f.z_t[i]);
    sums.z_1 += static_cast<double>(f.z_1[i]);
    sums.w += static_cast<double>(f.w[i]);
  }
  return sums;
}

template <class T>
inline void max_group(const T* x, F& m) {  // a NaN is passed over: it comes through the exponentials
  for (int at = 0; at < kLanes; at += S::kWidth) m = S::max(S::load(x + at), m);
}

// The running state of a row.
struct RowState {
  float s_max = -FLT_MAX, t_max = -FLT_MAX;  // not -inf: a chunk may be masked as a whole
  double z_s = 0, z_t = 0, z_1 = 0, w = 0;
};

// e^x for a rescale; never 0, which times an infinite sum would be NaN.
inline double shrink(double x) {
  const double e = __builtin_exp(x);
  return e < 1e-300 ? 1e-300 : e;
}

template <bool kThree, class T>
void add_chunk(RowState& row, const T* s, const T* t, int64_t n, double inverse_temperature, float* kept,
               int64_t stride) {
  constexpr double kLog2E = 1.4426950408889634;
  const int64_t whole = n / kLanes * kLanes;
  const Padded<T> s_rest(s + whole, n - whole), t_rest(t + whole, n - whole);
  F s_max = S::set1(row.s_max), t_max = S::set1(row.t_max);
  for (int64_t i = 0; i < whole; i += kLanes) {
    constexpr int64_t kNext = kChunk, kFar = 4 * kChunk;  // to L1 and L2; beyond the end a prefetch does nothing
    __builtin_prefetch(s + i + kNext, 0, 3);
    __builtin_prefetch(t + i + kNext, 0, 3);
    __builtin_prefetch(s + i + kFar, 0, 2);
    __builtin_prefetch(t + i + kFar, 0, 2);
    max_group(s + i, s_max);
    max_group(t + i, t_max);
  }
  max_group(s_rest.v, s_max);
  max_group(t_rest.v, t_max);
  const float s_now = S::max_across(s_max), t_now = S::max_across(t_max);
  if (s_now != row.s_max || t_now != row.t_max) {
    const double up_s = static_cast<double>(row.s_max) - static_cast<double>(s_now);
    const double up_t = static_cast<double>(row.t_max) - static_cast<double>(t_now);
    const double shrink_t = shrink(up_t * inverse_temperature);
    row.w = shrink_t * (row.w + row.z_t * (up_t - up_s));
    row.z_t *= shrink_t;
    row.z_s *= shrink(up_s * inverse_temperature);
    row.z_1 *= shrink(up_s);
    row.s_max = s_now;
    row.t_max = t_now;
  }
  const Scale c{S::set1(s_now), S::set1(t_now), S::set1(static_cast<float>(kLog2E * inverse_temperature)),
                S::set1(static_cast<float>(kLog2E))};
  Lanes<kVecs> lanes;
  clear(lanes);
  if (kept == nullptr) {
    for (int64_t i = 0; i < whole; i += kLanes) add_group<kThree>(lanes, s + i, t + i, c, nullptr, 0);
  } else {
    for (int64_t i = 0; i < whole; i += kLanes) add_group<kThree>(lanes, s + i, t + i, c, kept + i, stride);
  }
  if (whole < n) add_group<kThree>(lanes, s_rest.v, t_rest.v, c, kept == nullptr ? nullptr : kept + whole, stride);
  const ChunkSums sums = flush(lanes);
  row.z_s += sums.z_s;
  row.z_t += sums.z_t;
  row.z_1 += sums.z_1;
  row.w += sums.w;
}

// The exponentials of one vector: read back, or computed again.
struct Exps {
  F s, t, one;
};
template <bool kThree, bool kKept, class T>
inline Exps exps_at(const T* s, const T* t, const Scale& c, const float* kept, int64_t stride) {
  if constexpr (kKept) {
    return {S::load(kept), S::load(kept + stride), kThree ? S::load(kept + 2 * stride) : S::set1(0.0f)};
  } else {
    const F ds = S::sub(S::load(s), c.s_max);
    return {exp_at(ds, c.by_temperature), exp_at(S::sub(S::load(t), c.t_max), c.by_temperature),
            kThree ? exp_at(ds, c.plain) : S::set1(0.0f)};
  }
}

// Factors that make probabilities (or shares of the gradient) of a chunk's exponentials.
struct Factors {
  F s, t, one;
};

// One vector of terms of the Bregman form. Far apart (|d| >= 0.5) the plain sum of the three parts is precise; a class
// that the teacher masks is infinitely far and adds p_s.
inline F bregman(F s, F t, F p_s, F p_t, F offset, F inverse_temperature) {
  const F d = S::mul(S::sub(S::sub(t, s), offset), inverse_temperature);
  F series = S::set1(1.0f / 40320);
  series = S::fma(series, d, S::set1(-1.0f / 5040));
  series = S::fma(series, d, S::set1(1.0f / 720));
  series = S::fma(series, d, S::set1(-1.0f / 120));
  series = S::fma(series, d, S::set1(1.0f / 24));
  series = S::fma(series, d, S::set1(-1.0f / 6));
  series = S::fma(series, d, S::set1(0.5f));
  const F near = S::mul(p_t, S::mul(S::mul(d, d), series));
  const F far = S::fma(p_t, S::zero_where_equal(t, S::set1(-__builtin_inff()), d), S::sub(p_s, p_t));
  return S::select_negative(S::sub(S::abs(d), S::set1(0.5f)), near, far);
}

inline F grad_of(const Exps& e, const Factors& f) {  // not fused: equal logits must give exactly 0
  return S::add(S::sub(S::mul(e.s, f.s), S::mul(e.t, f.t)), S::mul(e.one, f.one));
}

// One row. kThree: the cross-entropy needs exponentials of its own (T is not 1). T: type of the logits, G: of grad.
template <bool kThree, class T, class G>
struct Row {
  const RowsArgs& a;
  const T* s;
  const T* t;
  double inverse_temperature;
  int64_t stride;  // between the parts of kept
  RowState sums;
  float s_max_at[kMaxKeptChunks], t_max_at[kMaxKeptChunks];  // what each chunk's kept exponentials are relative to

  Row(const RowsArgs& a, int64_t row)
      : a(a),
        s(static_cast<const T*>(a.student) + row * a.student_stride),
        t(static_cast<const T*>(a.teacher) + row * a.teacher_stride),
        inverse_temperature(1.0 / a.temperature),
        stride((a.classes + kLanes - 1) / kLanes * kLanes) {}

  double log_z(double z, float max) const { return __builtin_log(z) + static_cast<double>(max) * inverse_temperature; }

  void read() {
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const int64_t n = a.classes - i < kChunk ? a.classes - i : kChunk;
      add_chunk<kThree>(sums, s + i, t + i, n, inverse_temperature, a.kept == nullptr ? nullptr : a.kept + i, stride);
      if (a.kept != nullptr) {
        s_max_at[i / kChunk] = sums.s_max;
        t_max_at[i / kChunk] = sums.t_max;
      }
    }
  }

  double kl() const {
    // (max of t - max of s) / T cancels between w, which is relative to the maxima, and the two normalizers.
    const double kl = sums.w / sums.z_t * inverse_temperature - __builtin_log(sums.z_t) + __builtin_log(sums.z_s);
    return kl < kSmall ? small_kl() : kl;
  }

  // The double factors of chunk i: weight / z, and for kept exponentials the way from the chunk's maximum to the row's.
  Factors factors(int64_t chunk, double w_s, double w_t, double w_1) const {
    double up_s = 0, up_t = 0;
    if (a.kept != nullptr) {
      up_s = static_cast<double>(s_max_at[chunk]) - static_cast<double>(sums.s_max);
      up_t = static_cast<double>(t_max_at[chunk]) - static_cast<double>(sums.t_max);
    }
    const double z_1 = kThree ? sums.z_1 : 1.0;
    return {S::set1(static_cast<float>(__builtin_exp(up_s * inverse_temperature) / sums.z_s * w_s)),
            S::set1(static_cast<float>(__builtin_exp(up_t * inverse_temperature) / sums.z_t * w_t)),
            S::set1(static_cast<float>(__builtin_exp(up_s) / z_1 * w_1))};
  }

  Scale scale() const {
    constexpr double kLog2E = 1.4426950408889634;
    return {S::set1(sums.s_max), S::set1(sums.t_max), S::set1(static_cast<float>(kLog2E * inverse_temperature)),
            S::set1(static_cast<float>(kLog2E))};
  }

  double small_kl() const { return a.kept != nullptr ? small_kl_of<true>() : small_kl_of<false>(); }

  template <bool kKept>
  double small_kl_of() const {
    const double log_ratio = log_z(sums.z_t, sums.t_max) - log_z(sums.z_s, sums.s_max);
    const F offset = S::set1(static_cast<float>(log_ratio * a.temperature));
    const F inverse = S::set1(static_cast<float>(inverse_temperature));
    const Scale c = scale();
    double total = 0;
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const Factors f = factors(i / kChunk, 1, 1, 0);
      const int64_t end = a.classes - i < kChunk ? a.classes : i + kChunk, whole = end / kLanes * kLanes;
      float lanes[kLanes];
      F sum[kVecs];
      for (int v = 0; v < kVecs; ++v) sum[v] = S::set1(0.0f);
      const auto group = [&](const T* gs, const T* gt, const float* kept) {
        for (int v = 0; v < kVecs; ++v) {
          const int at = v * S::kWidth;
          const Exps e = exps_at<false, kKept>(gs + at, gt + at, c, kept + at, stride);
          sum[v] = S::add(
              sum[v], bregman(S::load(gs + at), S::load(gt + at), S::mul(e.s, f.s), S::mul(e.t, f.t), offset, inverse));
        }
      };
      for (int64_t j = i; j < whole; j += kLanes) group(s + j, t + j, kKept ? a.kept + j : lanes);
      if (whole < end) {
        const Padded<T> s_rest(s + whole, end - whole), t_rest(t + whole, end - whole);
        group(s_rest.v, t_rest.v, kKept ? a.kept + whole : lanes);
      }
      for (int v = 0; v < kVecs; ++v) S::store(lanes + v * S::kWidth, sum[v]);
      for (int j = 0; j < kLanes; ++j) total += static_cast<double>(lanes[j]);
    }
    return total;
  }

  template <bool kKept, bool kStream>
  void write_grad(G* grad, int64_t target, double w_s, double w_t, double w_1) const {
    const Scale c = scale();
    const double weight_of_target = a.target == nullptr ? 0 : a.ce_weight;
    for (int64_t i = 0; i < a.classes; i += kChunk) {
      const Factors f = factors(i / kChunk, w_s, w_t, w_1);
      const int64_t end = a.classes - i < kChunk ? a.classes : i + kChunk;
      const auto value = [&](int64_t j) {
        return grad_of(exps_at<kThree, kKept>(s + j, t + j, c, kKept ? a.kept + j : nullptr, stride), f);
      };
      // n < kWidth of them, from j on; what lies beyond a row is not read.
      const auto few = [&](int64_t j, int64_t n) {
        if (n <= 0) return;
        const Padded<T> gs(s + j, n), gt(t + j, n);
        float kept[3 * kLanes] = {};
        if constexpr (kKept)
          for (int part = 0; part < (kThree ? 3 : 2); ++part)
            memcpy(kept + part * kLanes, a.kept + part * stride + j, static_cast<size_t>(n) * sizeof(float));
        S::store_n(grad + j, grad_of(exps_at<kThree, kKept>(gs.v, gt.v, c, kept, kLanes), f), static_cast<int>(n));
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
        const F g = grad_of(exps_at<kThree, kKept>(gs.v, gt.v, c, kept, kLanes), f);
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
    const double z = kThree ? sums.z_1 : sums.z_s;
    float logit[kLanes];
    const Padded<T> one(s + target, 1);
    S::store(logit, S::load(one.v));
    return __builtin_log(z) + (static_cast<double>(sums.s_max) - static_cast<double>(logit[0]));
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
