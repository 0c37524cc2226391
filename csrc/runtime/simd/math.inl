// Elementary functions over a level's Simd type, written once: each level rounds at the same places, so results are
// bit-equal. Included after one of simd/{scalar,avx2,avx512}.h.
#pragma once

namespace {

// e^x, x clamped to [-87, 88]: relative error 1.2e-7, no denormal is made (they cost five-fold in an epilogue).
// Cody-Waite reduction by ln 2 in two parts, then 1 + r + r^2 Q(r), Q of degree 4 (minimax, 3e-9). NaN stays NaN.
inline Simd::F exp_clamped(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-87.0f), S::min(S::set1(88.0f), x));
  const S::F n = S::round(S::mul(x, S::set1(1.44269504f)));
  S::F r = S::fma(n, S::set1(-0.693145752f), x);
  r = S::fma(n, S::set1(-1.42860677e-6f), r);
  S::F q = S::set1(1.381443231e-3f);
  q = S::fma(q, r, S::set1(8.368722163e-3f));
  q = S::fma(q, r, S::set1(4.166838899e-2f));
  q = S::fma(q, r, S::set1(1.666652113e-1f));
  q = S::fma(q, r, S::set1(4.999999404e-1f));
  const S::F p = S::add(S::fma(S::mul(r, r), q, r), S::set1(1.0f));
  return S::mul(p, S::exp2_of(n));
}

// x * Phi(x), the exact GELU. Phi from erfc(t) = e^(-t^2) u P(u), u = 1 / (1 + 0.3 t), t = |x| / sqrt 2, P of degree 8
// fitted for relative error 4e-8 on [0, 9.5]: the left tail keeps its relative precision, which 1 + erf(x) loses.
inline Simd::F gelu(Simd::F x) {
  using S = Simd;
  const S::F t = S::mul(S::abs(x), S::set1(0.707106781f));
  const S::F u = S::div(S::set1(1.0f), S::fma(t, S::set1(0.3f), S::set1(1.0f)));
  S::F p = S::set1(-1.294369698e-1f);
  p = S::fma(p, u, S::set1(4.851098955e-1f));
  p = S::fma(p, u, S::set1(-5.112528801e-1f));
  p = S::fma(p, u, S::set1(5.464236140e-1f));
  p = S::fma(p, u, S::set1(-9.364964068e-2f));
  p = S::fma(p, u, S::set1(2.144434452e-1f));
  p = S::fma(p, u, S::set1(1.484808028e-1f));
  p = S::fma(p, u, S::set1(1.706921309e-1f));
  p = S::fma(p, u, S::set1(1.691896021e-1f));
  const S::F e = exp_clamped(S::mul(S::mul(x, x), S::set1(-0.5f)));
  const S::F tail = S::mul(S::mul(p, S::mul(u, S::set1(0.5f))), e);  // Phi(-|x|)
  return S::mul(x, S::select_negative(x, tail, S::sub(S::set1(1.0f), tail)));
}

// x / (1 + e^-x), x from -88 on: below, the clamped exponential would leave a multiple of x.
inline Simd::F silu(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-88.0f), x);
  return S::div(x, S::add(S::set1(1.0f), exp_clamped(S::mul(x, S::set1(-1.0f)))));
}

inline Simd::F relu(Simd::F x) { return Simd::max(Simd::set1(0.0f), x); }  // NaN stays NaN

}  // namespace
