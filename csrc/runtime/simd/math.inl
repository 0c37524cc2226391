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

// Phi(-|x|) and e^(-x^2 / 2). Phi from erfc(t) = e^(-t^2) u P(u), u = 1 / (1 + 0.3 t), t = |x| / sqrt 2, P of degree 8
// fitted for relative error 4e-8 on [0, 9.5]: the left tail keeps its relative precision, which 1 + erf(x) loses.
inline void gelu_tail(Simd::F x, Simd::F* tail, Simd::F* e) {
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
  // Beyond |x| = 12.9 both are 0: the tail would be denormal, which costs more than all the rest.
  const S::F power = S::mul(S::mul(x, x), S::set1(-0.5f));
  *e = S::select_negative(S::add(power, S::set1(83.0f)), S::set1(0.0f), exp_clamped(power));
  *tail = S::mul(S::mul(p, S::mul(u, S::set1(0.5f))), *e);
}

// x * Phi(x), the exact GELU.
inline Simd::F gelu(Simd::F x) {
  using S = Simd;
  S::F tail, e;
  gelu_tail(x, &tail, &e);
  return S::mul(x, S::select_negative(x, tail, S::sub(S::set1(1.0f), tail)));
}

// x / (1 + e^-x), x from -88 on: below, the clamped exponential would leave a multiple of x.
inline Simd::F silu(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-88.0f), x);
  return S::div(x, S::add(S::set1(1.0f), exp_clamped(S::mul(x, S::set1(-1.0f)))));
}

// Phi(x) + x phi(x), the derivative of gelu(); beyond |x| = 14 it is 0 or 1, so x stays where its square is finite.
inline Simd::F gelu_derivative(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-14.0f), S::min(S::set1(14.0f), x));
  S::F tail, e;
  gelu_tail(x, &tail, &e);
  const S::F phi = S::mul(e, S::set1(0.398942280f));
  return S::fma(x, phi, S::select_negative(x, tail, S::sub(S::set1(1.0f), tail)));
}

// s (1 + x (1 - s)), s = 1 / (1 + e^-x); 1 - s as e^-x s, which is exact where s is near 1.
inline Simd::F silu_derivative(Simd::F x) {
  using S = Simd;
  x = S::max(S::set1(-87.0f), S::min(S::set1(87.0f), x));
  const S::F e = exp_clamped(S::mul(x, S::set1(-1.0f)));
  const S::F s = S::div(S::set1(1.0f), S::add(S::set1(1.0f), e));
  return S::fma(S::mul(x, S::mul(e, s)), s, s);
}

inline Simd::F relu(Simd::F x) { return Simd::max(Simd::set1(0.0f), x); }  // NaN stays NaN

}  // namespace
