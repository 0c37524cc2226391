// kl_div, distill_loss, CUDA sm_80: the row losses and the gradient of ../kl_loss.h, and their sums.
// Idea     every thread keeps running maxima and sums of its share of a row (online softmax), so one reading gives the
//          statistics of a row of any length; a second one writes the gradient. KL < kSmall: one more (Bregman form).
// Work     a warp a row up to kWarpRow classes (shuffles alone); a block a row beyond, of 256 threads up to kLongRow
//          and of 1024 above: few rows are then under way at a time, and the second reading finds the row in L2.
// Sums     float32 in a thread (up to 64 logits in rows of 64K), double across threads, always in the same order:
//          within a warp by butterfly, warps through shared memory; the rows' losses by one block in a second kernel.
// Tails    groups of 8 logits begin where the student's row is at a multiple of 8 elements; those that reach beyond the
//          row, and those where a pointer is at no multiple of 16 bytes, go one by one.
// Bound    bytes: 12 a logit (float32, with gradient) while rows under way stay in L2, else 20. Per logit 4 (with
//          targets and T != 1: 6) exp2f.
// Registers 64 at most in blocks, 80 in warps (left alone up to 87, and a block less on an SM), no spills (nvcc 13.0);
//          1320 bytes of shared memory. A block of 1024 threads has no more, so one of them, or 4 of 256, are on an SM.
// Measured never run on hardware.
#include "sm80.h"

#include <cfloat>
#include <cmath>

#include "../../runtime/cuda/device.h"

namespace fs::kl_loss::sm80 {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / 32;
constexpr int64_t kWarpRow = 1024;     // 4 groups a lane
constexpr int64_t kLongRow = 16384;    // 8 groups a thread
constexpr int64_t kMaxBlocks = 65535;  // more rows than that: each block takes several
constexpr float kLog2E = 1.44269504f;

// --- The threads that share a row -----------------------------------------------------------------------------------

__device__ __forceinline__ float max_of_warp(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Each lane adds the same pairs, so all have the same bits.
__device__ __forceinline__ double sum_of_warp(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// What all threads of a row must know before the next reading.
struct Facts {
  float p_s, p_t;                // an exponential times this is a probability
  float grad_s, grad_t, grad_1;  // an exponential times this is its part of the gradient
  float grad_target;             // what the gradient is less at the target
  float offset;                  // T (log Z(t) - log Z(s)): t - s where the probabilities are equal
  float minus_rest;              // what its rounding took, / T
  bool small;                    // kl is to be summed in the Bregman form
};

// Both kinds of team: max() gives every thread the maxima; sum() gives the sums to the threads that lead(), and share()
// hands what those made of them to all.
struct WarpTeam {
  int rank;
  __device__ __forceinline__ int size() const { return 32; }
  __device__ __forceinline__ bool leads() const { return true; }
  __device__ __forceinline__ void max(float& a, float& b) const {
    a = max_of_warp(a);
    b = max_of_warp(b);
  }
  template <int kCount>
  __device__ __forceinline__ void sum(double (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = sum_of_warp(x[i]);
  }
  __device__ __forceinline__ void share(Facts&) const {}
};

// Between two writes of one of these arrays lies a barrier of another: max, sum, share follow each other in every row.
struct Shared {
  float max[2][kMostWarps];
  double sum[4][kMostWarps];
  Facts facts;
};

struct BlockTeam {
  Shared& shared;
  int rank;
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ int lane() const { return rank % 32; }
  __device__ __forceinline__ int warp() const { return rank / 32; }
  __device__ __forceinline__ bool of_a_warp() const { return lane() < size() / 32; }  // lane l looks at warp l's value
  __device__ __forceinline__ bool leads() const { return warp() == 0; }

  __device__ __forceinline__ void max(float& a, float& b) const {
    a = max_of_warp(a);
    b = max_of_warp(b);
    if (lane() == 0) {
      shared.max[0][warp()] = a;
      shared.max[1][warp()] = b;
    }
    __syncthreads();
    a = max_of_warp(of_a_warp() ? shared.max[0][lane()] : -FLT_MAX);
    b = max_of_warp(of_a_warp() ? shared.max[1][lane()] : -FLT_MAX);
  }

  template <int kCount>
  __device__ __forceinline__ void sum(double (&x)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = sum_of_warp(x[i]);
      if (lane() == 0) shared.sum[i][warp()] = x[i];
    }
    __syncthreads();
    if (!leads()) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = sum_of_warp(of_a_warp() ? shared.sum[i][lane()] : 0.0);
  }

  __device__ __forceinline__ void share(Facts& facts) const {
    if (rank == 0) shared.facts = facts;
    __syncthreads();
    facts = shared.facts;
  }
};

// --- Eight logits at a time -----------------------------------------------------------------------------------------

constexpr int kGroup = 8;

// A group of a row: elements i + first .. i + last - 1 of it; i may be negative.
struct Group {
  int64_t i;
  int first, last;
  __device__ __forceinline__ bool whole() const { return first == 0 && last == kGroup; }
};

// Calls body(group) for the groups of a row of n that are this thread's. `row` says where they begin.
template <class T, class Team, class Body>
__device__ __forceinline__ void for_groups(const Team& team, const T* row, int64_t n, const Body& body) {
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kGroup);
  for (int64_t i = static_cast<int64_t>(team.rank) * kGroup - before; i < n;
       i += static_cast<int64_t>(team.size()) * kGroup)
    body(Group{i, i < 0 ? static_cast<int>(-i) : 0, n - i < kGroup ? static_cast<int>(n - i) : kGroup});
}

// What is not there is masked: it changes nothing.
template <class T>
__device__ __forceinline__ void load_group(const T* row, const Group& g, float (&x)[kGroup]) {
  constexpr int kVector = Vector16<T>::kCount;
  if (g.whole() && is_aligned(row + g.i, 16)) {
#pragma unroll
    for (int j = 0; j < kGroup; j += kVector) {
      const uint4 raw = ptx::load16(row + g.i + j);
      Vector16<T> v;
      memcpy(&v, &raw, 16);
#pragma unroll
      for (int k = 0; k < kVector; ++k) x[j + k] = to_float(v.at[k]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) x[j] = j >= g.first && j < g.last ? to_float(row[g.i + j]) : -INFINITY;
}

// First to leave the caches, so that the logits stay in them.
template <class G>
__device__ __forceinline__ void store_group(G* row, const Group& g, const float (&x)[kGroup]) {
  constexpr int kVector = Vector16<G>::kCount;
  if (g.whole() && is_aligned(row + g.i, 16)) {
#pragma unroll
    for (int j = 0; j < kGroup; j += kVector) {
      Vector16<G> v;
#pragma unroll
      for (int k = 0; k < kVector; ++k) v.at[k] = from_float<G>(x[j + k]);
      uint4 raw;
      memcpy(&raw, &v, 16);
      ptx::store16_stream(row + g.i + j, raw);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    if (j >= g.first && j < g.last) row[g.i + j] = from_float<G>(x[j]);
}

// --- The parts of a row ---------------------------------------------------------------------------------------------

// e^(shifted / T) with by = log2(e) / T and shifted <= 0: 0 for -inf; what is finite stays above 0, as on the CPU,
// since 0 times an infinite difference would be NaN. A NaN stays.
__device__ __forceinline__ float exp_at(float shifted, float by) {
  const float x = __fmul_rn(shifted, by);
  const float e = exp2f(x < -125.0f ? -125.0f : x);
  return x == -INFINITY ? 0.0f : e;
}

// The same for a rescale, where -inf (the first logit after none) needs no exact 0: there the sums are still 0.
__device__ __forceinline__ float shrink(float x) { return exp2f(x < -125.0f ? -125.0f : x); }

// How the logits become exponents.
struct Scale {
  float by_temperature;  // log2(e) / T
  float inverse_temperature;
};

// Sums of exponentials relative to the maxima so far; w of e_t ((t - t_max) - (s - s_max)).
struct Sums {
  float s_max = -FLT_MAX, t_max = -FLT_MAX;  // not -inf: everything so far may be masked
  float z_s = 0.0f, z_t = 0.0f, z_1 = 0.0f, w = 0.0f;

  __device__ __forceinline__ void rescale(float s_now, float t_now, float by) {
    const float up_s = s_max - s_now, up_t = t_max - t_now;
    const float by_t = shrink(__fmul_rn(up_t, by));
    // Without a logit of the teacher yet the maxima are no logits, and their difference may be infinite.
    const float moved = z_t == 0.0f ? 0.0f : z_t * (up_t - up_s);
    w = by_t * (w + moved);
    z_t *= by_t;
    z_s *= shrink(__fmul_rn(up_s, by));
    z_1 *= shrink(__fmul_rn(up_s, kLog2E));
    s_max = s_now;
    t_max = t_now;
  }
};

// kThree: the cross-entropy needs exponentials of its own (T is not 1).
template <bool kThree>
__device__ __forceinline__ void add_group(Sums& sums, const float (&s)[kGroup], const float (&t)[kGroup], float by) {
  float s_now = sums.s_max, t_now = sums.t_max;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {  // fmaxf passes NaNs over: they come through the exponentials
    s_now = fmaxf(s_now, s[j]);
    t_now = fmaxf(t_now, t[j]);
  }
  if (s_now != sums.s_max || t_now != sums.t_max) sums.rescale(s_now, t_now, by);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const float ds = s[j] - s_now, dt = t[j] - t_now;
    const float e_t = exp_at(dt, by);
    sums.z_s += exp_at(ds, by);
    sums.z_t += e_t;
    sums.w = fmaf(e_t, dt == -INFINITY ? 0.0f : dt - ds, sums.w);
    if constexpr (kThree) sums.z_1 += exp_at(ds, kLog2E);
  }
}

// A term of the Bregman form p_t (e^-d - 1 + d) into kl, of p_t d into mean_d; cpu/loss.inl says why so: t - s without
// its rounding; near (|d| < 2) p_t d^2 P(d). A class that the teacher masks is infinitely far and adds p_s.
__device__ __forceinline__ void add_bregman(float& kl, float& mean_d, float s, float t, float p_s, float p_t,
                                            const Facts& f, float inverse) {
  const float apart = t - s, minus_s = apart - t;
  const float taken = (t - (apart - minus_s)) - (s + minus_s);
  const float d = fmaf(apart - f.offset, inverse, fmaf(taken, inverse, f.minus_rest));
  float series = fmaf(2.8162353e-7f, d, -2.9843188e-6f);
  series = fmaf(series, d, 2.4847946e-5f);
  series = fmaf(series, d, -1.9774109e-4f);
  series = fmaf(series, d, 1.3886975e-3f);
  series = fmaf(series, d, -8.334049e-3f);
  series = fmaf(series, d, 4.1666847e-2f);
  series = fmaf(series, d, -1.6666646e-1f);
  series = fmaf(series, d, 0.49999997f);
  const float weighted = p_t * (t == -INFINITY ? 0.0f : d);
  kl += fabsf(d) < 2.0f ? weighted * d * series : weighted + (p_s - p_t);
  mean_d += weighted;
}

// All that a kernel knows of the loss; RowsArgs with types, and the count of the rows that count.
template <class T, class G>
struct Loss {
  const T *student, *teacher;
  int64_t student_stride, teacher_stride, rows, classes;
  double temperature;
  const int64_t* target;
  int64_t ignore_index;
  const double* valid;  // or null: the weights are not divided
  double *kl, *ce;
  float* row_loss;
  double row_scale;
  G* grad;
  double kl_weight, ce_weight;
};

struct Totals {
  double z_s, z_t, z_1, w;
};

// By the threads that lead: what the sums of a row say.
template <bool kThree, class T, class G>
__device__ __forceinline__ Facts facts_of(const Loss<T, G>& l, const Sums& sums, const Totals& z, bool target_is_bad,
                                          double& kl) {
  const double inverse = 1.0 / l.temperature;
  const double log_s = log(z.z_s), log_t = log(z.z_t);
  // (max of t - max of s) / T cancels between w, which is relative to the maxima, and the two normalizers.
  kl = z.w / z.z_t * inverse - log_t + log_s;
  const double apart = static_cast<double>(sums.t_max) - static_cast<double>(sums.s_max);
  const double n = l.valid == nullptr ? 1.0 : fmax(*l.valid, 1.0);
  const double w_ce = l.target == nullptr ? 0.0 : l.ce_weight / n;
  const double w_kl = target_is_bad ? static_cast<double>(NAN) : l.kl_weight / n;
  Facts f;
  f.p_s = static_cast<float>(1.0 / z.z_s);
  f.p_t = static_cast<float>(1.0 / z.z_t);
  f.grad_s = static_cast<float>((w_kl + (kThree ? 0.0 : w_ce)) / z.z_s);  // at temperature 1 the softmaxes are one
  f.grad_t = static_cast<float>(w_kl / z.z_t);
  f.grad_1 = kThree ? static_cast<float>(w_ce / z.z_1) : 0.0f;
  f.grad_target = static_cast<float>(w_ce);
  const double offset = (log_t - log_s) * l.temperature + apart;
  f.offset = static_cast<float>(offset);
  f.minus_rest = static_cast<float>((static_cast<double>(f.offset) - offset) * inverse);
  f.small = kl < kSmall;
  return f;
}

template <bool kThree, class T, class G, class Team>
__device__ __forceinline__ void write_grad(const Loss<T, G>& l, const Team& team, const T* s, const T* t, G* grad,
                                           int64_t target, const Sums& sums, const Facts& f, float by) {
  for_groups(team, s, l.classes, [&](const Group& g) {
    float x[kGroup], y[kGroup];
    load_group(s, g, x);
    load_group(t, g, y);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float ds = x[j] - sums.s_max;
      // Not fused: equal logits must give exactly 0.
      float value = __fsub_rn(__fmul_rn(exp_at(ds, by), f.grad_s), __fmul_rn(exp_at(y[j] - sums.t_max, by), f.grad_t));
      if constexpr (kThree) value = __fadd_rn(value, __fmul_rn(exp_at(ds, kLog2E), f.grad_1));
      x[j] = g.i + j == target ? __fsub_rn(value, f.grad_target) : value;
    }
    store_group(grad, g, x);
  });
}

template <bool kThree, class T, class G, class Team>
__device__ __forceinline__ void row_of(const Loss<T, G>& l, const Team& team, int64_t row) {
  const T* s = l.student + row * l.student_stride;
  const T* t = l.teacher + row * l.teacher_stride;
  G* grad = l.grad == nullptr ? nullptr : l.grad + row * l.classes;
  const int64_t target = l.target == nullptr ? -1 : l.target[row];
  if (l.target != nullptr && target == l.ignore_index) {
    if (team.rank == 0) l.kl[row] = l.ce[row] = 0.0;
    if (grad != nullptr)
      for_groups(team, grad, l.classes, [&](const Group& g) {
        const float zeros[kGroup] = {};
        store_group(grad, g, zeros);
      });
    return;
  }
  const bool target_is_bad = l.target != nullptr && (target < 0 || target >= l.classes);
  const float inverse = static_cast<float>(1.0 / l.temperature);
  const float by = static_cast<float>(1.4426950408889634 / l.temperature);

  Sums sums;
  for_groups(team, s, l.classes, [&](const Group& g) {
    float x[kGroup], y[kGroup];
    load_group(s, g, x);
    load_group(t, g, y);
    add_group<kThree>(sums, x, y, by);
  });
  float s_max = sums.s_max, t_max = sums.t_max;
  team.max(s_max, t_max);
  sums.rescale(s_max, t_max, by);
  double all[4] = {sums.z_s, sums.z_t, sums.w, sums.z_1};
  team.sum(all);
  Facts facts{};
  double kl = 0.0;
  if (team.leads()) facts = facts_of<kThree>(l, sums, {all[0], all[1], all[3], all[2]}, target_is_bad, kl);
  team.share(facts);

  if (facts.small) {
    float sum = 0.0f, mean_d = 0.0f;
    for_groups(team, s, l.classes, [&](const Group& g) {
      float x[kGroup], y[kGroup];
      load_group(s, g, x);
      load_group(t, g, y);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        add_bregman(sum, mean_d, x[j], y[j], exp_at(x[j] - s_max, by) * facts.p_s, exp_at(y[j] - t_max, by) * facts.p_t,
                    facts, inverse);
    });
    double terms[2] = {static_cast<double>(sum), static_cast<double>(mean_d)};
    team.sum(terms);
    // What the sums of exponentials are off moves every d by mean_d - kl, and kl by half its square.
    const double moved = terms[1] - terms[0];
    kl = terms[0] - 0.5 * moved * moved;
    if (kl < 0.0) kl = 0.0;
  }
  if (team.rank == 0) {
    l.kl[row] = kl;
    if (l.row_loss != nullptr) l.row_loss[row] = static_cast<float>(kl * l.row_scale);
    if (l.target != nullptr)
      l.ce[row] = target_is_bad ? static_cast<double>(NAN)
                                : log(kThree ? all[3] : all[0]) +
                                      (static_cast<double>(s_max) - static_cast<double>(to_float(s[target])));
  }
  if (grad != nullptr) write_grad<kThree>(l, team, s, t, grad, target, sums, facts, by);
}

// --- Kernels --------------------------------------------------------------------------------------------------------

// Warp w of block b takes row b * kThreads / 32 + w, and so on in steps of the grid.
template <bool kThree, class T, class G>
__global__ void __launch_bounds__(kThreads, 3) rows_by_warp(Loss<T, G> l) {
  constexpr int kRows = kThreads / 32;
  const WarpTeam team{static_cast<int>(threadIdx.x) % 32};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32; row < l.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows)
    row_of<kThree>(l, team, row);
}

template <bool kThree, class T, class G>
__global__ void __launch_bounds__(kMostThreads) rows_by_block(Loss<T, G> l) {
  FS_SHARED(Shared, shared, );
  const BlockTeam team{shared, static_cast<int>(threadIdx.x)};
  for (int64_t row = blockIdx.x; row < l.rows; row += gridDim.x) row_of<kThree>(l, team, row);
}

// One block: *valid = the number of targets that are not ignored.
__global__ void __launch_bounds__(kMostThreads)
    count_targets(const int64_t* target, int64_t rows, int64_t ignore_index, double* valid) {
  FS_SHARED(Shared, shared, );
  const BlockTeam team{shared, static_cast<int>(threadIdx.x)};
  double count[1] = {};
  for (int64_t r = team.rank; r < rows; r += team.size()) count[0] += target[r] != ignore_index ? 1.0 : 0.0;
  team.sum(count);
  if (team.rank == 0) *valid = count[0];
}

// What becomes of the sums: *kl = sum(kl) * kl_scale / n, and with ce the three means of distill_loss.
struct Reduction {
  double kl_scale, alpha;
  const double* valid;  // n, or null: 1
  float *kl, *ce, *loss;
};

// One block: the sums over the rows, each thread's in the order of its rows.
__global__ void __launch_bounds__(kMostThreads)
    sum_rows(const double* kl, const double* ce, int64_t rows, Reduction reduction) {
  FS_SHARED(Shared, shared, );
  const BlockTeam team{shared, static_cast<int>(threadIdx.x)};
  double sums[2] = {};
  for (int64_t r = team.rank; r < rows; r += team.size()) {
    sums[0] += kl[r];
    if (reduction.ce != nullptr) sums[1] += ce[r];
  }
  team.sum(sums);
  if (team.rank != 0) return;
  const double n = reduction.valid == nullptr ? 1.0 : fmax(*reduction.valid, 1.0);  // the mean of nothing is 0
  const double mean_kl = sums[0] * reduction.kl_scale / n, mean_ce = sums[1] / n;
  *reduction.kl = static_cast<float>(mean_kl);
  if (reduction.ce == nullptr) return;
  *reduction.ce = static_cast<float>(mean_ce);
  *reduction.loss = static_cast<float>(reduction.alpha * mean_kl + (1.0 - reduction.alpha) * mean_ce);
}

// --- Launchers ------------------------------------------------------------------------------------------------------

template <bool kThree, class T, class G>
void launch_rows(const RowsArgs& a, float* row_loss, double row_scale, const double* valid, cudaStream_t stream) {
  const Loss<T, G> l{static_cast<const T*>(a.student),
                     static_cast<const T*>(a.teacher),
                     a.student_stride,
                     a.teacher_stride,
                     a.rows,
                     a.classes,
                     a.temperature,
                     a.target,
                     a.ignore_index,
                     valid,
                     a.kl,
                     a.ce,
                     row_loss,
                     row_scale,
                     static_cast<G*>(a.grad),
                     a.kl_weight,
                     a.ce_weight};
  const bool by_warp = a.classes <= kWarpRow;
  const int64_t blocks = by_warp ? (a.rows + kThreads / 32 - 1) / (kThreads / 32) : a.rows;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  const dim3 block(by_warp || a.classes <= kLongRow ? kThreads : kMostThreads);
  launch({grid, block, 0, stream}, by_warp ? rows_by_warp<kThree, T, G> : rows_by_block<kThree, T, G>, l);
}

template <class T, class G>
void rows_as(const RowsArgs& a, float* row_loss, double row_scale, const double* valid, cudaStream_t stream) {
  if (a.target != nullptr && a.temperature != 1.0)
    launch_rows<true, T, G>(a, row_loss, row_scale, valid, stream);
  else
    launch_rows<false, T, G>(a, row_loss, row_scale, valid, stream);
}

void all_rows(const RowsArgs& a, float* row_loss, double row_scale, const double* valid, cudaStream_t stream) {
  if (a.rows == 0) return;
  switch (a.dtype) {
    case DType::f32: return rows_as<float, float>(a, row_loss, row_scale, valid, stream);
    case DType::bf16: return rows_as<__nv_bfloat16, __nv_bfloat16>(a, row_loss, row_scale, valid, stream);
    case DType::f16: return rows_as<__half, float>(a, row_loss, row_scale, valid, stream);
  }
}

// Scratch: the count, kl of every row, ce of every row.
RowsArgs with_scratch(const RowsArgs& rows, void* scratch) {
  RowsArgs a = rows;
  a.kl = static_cast<double*>(scratch) + 1;
  a.ce = a.kl + a.rows;
  return a;
}

}  // namespace

int64_t scratch_bytes(int64_t rows) { return (1 + 2 * rows) * static_cast<int64_t>(sizeof(double)); }

void kl_div(const LossArgs& args, float* total, void* scratch, void* stream) {
  auto* s = static_cast<cudaStream_t>(stream);
  const RowsArgs a = with_scratch(args.rows, scratch);
  all_rows(a, args.row_loss, args.row_scale, nullptr, s);
  if (total == nullptr) return;
  launch({dim3(1), dim3(kMostThreads), 0, s}, sum_rows, a.kl, a.ce, a.rows,
         Reduction{args.row_scale, 1.0, nullptr, total, nullptr, nullptr});
}

void distill_loss(const RowsArgs& rows, double alpha, const Means& means, void* scratch, void* stream) {
  auto* s = static_cast<cudaStream_t>(stream);
  const RowsArgs a = with_scratch(rows, scratch);
  auto* valid = static_cast<double*>(scratch);
  launch({dim3(1), dim3(kMostThreads), 0, s}, count_targets, a.target, a.rows, a.ignore_index, valid);
  all_rows(a, nullptr, 0.0, valid, s);
  launch({dim3(1), dim3(kMostThreads), 0, s}, sum_rows, a.kl, a.ce, a.rows,
         Reduction{a.temperature * a.temperature, alpha, valid, means.kl, means.ce, means.loss});
}

}  // namespace fs::kl_loss::sm80
