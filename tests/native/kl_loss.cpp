// Holds every row of the kl_loss table that this CPU runs against the scalar row, bit for bit, and the scalar row
// against plain loops in double; without torch, so that it is a small static program which an instruction emulator can
// run too. Inputs lie between margins of NaN and outputs between canaries: a read outside changes a result, a write
// shows.
//
// Usage: kl_loss [cases] [seed]. Exit status 0: all equal.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kl_loss/kl_loss.h"
#include "../../csrc/kl_loss/select.h"
#include "support.h"

namespace {

using namespace fs::kl_loss;

void put(uint8_t* p, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32) {
    std::memcpy(p + 4 * i, &value, 4);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::f16) {  // truncated; what does not fit keeps its kind
    const uint32_t rest = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    half = static_cast<uint16_t>(sign | (rest > 0x7f800000    ? 0x7e00
                                         : rest == 0x7f800000 ? 0x7c00
                                         : rest < 0x38800000  ? 0
                                                              : (rest - 0x38000000) >> 13));
  }
  std::memcpy(p + 2 * i, &half, 2);
}

// All NaNs are made one before bits are compared.
void canonical(std::vector<uint8_t>& bytes, size_t size) {
  for (size_t i = 0; i + size <= bytes.size(); i += size) {
    bool nan = false;
    if (size == 8) {
      double d;
      std::memcpy(&d, &bytes[i], 8);
      nan = d != d;
    } else if (size == 4) {
      float f;
      std::memcpy(&f, &bytes[i], 4);
      nan = f != f;
    } else {
      uint16_t h;
      std::memcpy(&h, &bytes[i], 2);
      nan = (h & 0x7fff) > 0x7f80;
    }
    if (nan) std::memset(&bytes[i], 0xff, size);
  }
}

void check(const std::vector<const Kernels*>& table_rows) {
  const int64_t rows = pick({1, 2, 3, 5}),
                classes = pick({1, 2, 7, 15, 16, 17, 31, 33, 100, 777, 1023, 1024, 1025, 1056, 2049, 13000});
  const int64_t stride = classes + pick({0, 0, 3});
  RowsArgs a{};
  a.dtype = static_cast<DType>(uniform(0, 2));
  const size_t size = a.dtype == DType::f32 ? 4 : 2, grad_size = a.dtype == DType::bf16 ? 2 : 4;
  // far apart, close, masked, not finite, rising by up to 600, close but for a constant
  const int kind = static_cast<int>(uniform(0, 5));
  Guarded student(static_cast<size_t>(rows * stride) * size, 0xff), teacher(student.bytes, 0xff);
  std::normal_distribution<float> normal;
  std::vector<double> s(static_cast<size_t>(rows * classes)), t(s.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < classes; ++c) {
      float vs = 2 * normal(generator),
            vt = kind == 1 || kind == 5 ? vs + 0.01f * normal(generator) : 2 * normal(generator);
      if (kind == 5) vt += 30;
      if (kind == 4) vt += 0.05f * static_cast<float>(c % 12000);
      if ((kind == 2 || kind == 3) && uniform(0, 9) == 0) vt = -INFINITY;
      if ((kind == 2 || kind == 3) && uniform(0, 99) == 0) vs = vt = -INFINITY;
      if (kind == 3 && uniform(0, 999) == 0) (uniform(0, 1) ? vs : vt) = uniform(0, 1) ? NAN : INFINITY;
      put(student.data(), a.dtype, r * stride + c, vs);
      put(teacher.data(), a.dtype, r * stride + c, vt);
      s[static_cast<size_t>(r * classes + c)] = static_cast<double>(vs);
      t[static_cast<size_t>(r * classes + c)] = static_cast<double>(vt);
    }
  std::vector<int64_t> target(static_cast<size_t>(rows));
  for (int64_t& index : target) index = uniform(0, 4) == 0 ? -100 : uniform(0, classes - 1);
  a.student = student.data();
  a.teacher = teacher.data();
  a.student_stride = a.teacher_stride = stride;
  a.rows = rows;
  a.classes = classes;
  a.temperature = uniform(0, 1) ? 1.0 : 2.5;
  a.ignore_index = -100;
  const bool with_target = uniform(0, 1), with_grad = uniform(0, 3) != 0, streamed = uniform(0, 1),
             keeps = uniform(0, 3) != 0;
  a.target = with_target ? target.data() : nullptr;
  a.kl_weight = 0.7;
  a.ce_weight = 0.3;
  const std::string what = "rows " + std::to_string(rows) + " classes " + std::to_string(classes) + " dtype " +
                           std::to_string(static_cast<int>(a.dtype)) + " kind " + std::to_string(kind) +
                           (with_target ? " target" : "") + (with_grad ? " grad" : "") + (streamed ? " stream" : "") +
                           (keeps ? " keeps" : "");
  std::vector<uint8_t> expected;
  for (const Kernels* row : table_rows) {  // scalar first
    Guarded kl(static_cast<size_t>(rows) * 8, 0), ce(kl.bytes, 0),
        grad(static_cast<size_t>(rows * classes) * grad_size, 0x5a);
    const int64_t floats = keeps ? kept_floats(classes, with_grad) : 0;
    Guarded kept(static_cast<size_t>(floats) * 4, 0x5a);
    a.kl = reinterpret_cast<double*>(kl.data());
    a.ce = reinterpret_cast<double*>(ce.data());
    a.grad = with_grad ? grad.data() : nullptr;
    a.kept = floats == 0 ? nullptr : reinterpret_cast<float*>(kept.data());
    a.stream = streamed && with_grad;
    row->rows(a);
    if (!kl.margins_intact() || !ce.margins_intact() || !grad.margins_intact() || !kept.margins_intact())
      fail(*row, what + ": wrote outside");
    std::vector<uint8_t> numbers(kl.data(), kl.data() + kl.bytes), gradient(grad.data(), grad.data() + grad.bytes);
    numbers.insert(numbers.end(), ce.data(), ce.data() + ce.bytes);
    canonical(numbers, 8);
    canonical(gradient, grad_size);
    numbers.insert(numbers.end(), gradient.begin(), gradient.end());
    if (row != table_rows.front()) {
      if (numbers != expected) fail(*row, what + ": differs from scalar");
      continue;
    }
    expected = numbers;
    if (a.dtype != DType::f32 || kind == 2 || kind == 3) continue;
    for (int64_t r = 0; r < rows; ++r) {
      if (with_target && target[static_cast<size_t>(r)] == -100) continue;
      const double *sr = s.data() + r * classes, *tr = t.data() + r * classes;
      double z_s = 0, z_t = 0, z_1 = 0, want = 0;
      for (int64_t c = 0; c < classes; ++c) {
        z_s += std::exp(sr[c] / a.temperature);
        z_t += std::exp(tr[c] / a.temperature);
        z_1 += std::exp(sr[c]);
      }
      for (int64_t c = 0; c < classes; ++c)
        want +=
            std::exp(tr[c] / a.temperature) / z_t * ((tr[c] - sr[c]) / a.temperature - std::log(z_t) + std::log(z_s));
      if (!(std::abs(a.kl[r] - want) <= 2e-6 * want + 1e-12))
        fail(*row, what + ": kl " + std::to_string(a.kl[r]) + ", wanted " + std::to_string(want));
      if (with_target) {
        const double want_ce = std::log(z_1) - sr[target[static_cast<size_t>(r)]];
        if (!(std::abs(a.ce[r] - want_ce) <= 1e-6))
          fail(*row, what + ": ce " + std::to_string(a.ce[r]) + ", wanted " + std::to_string(want_ce));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  std::vector<const Kernels*> rows;
  std::string names;
  for (const Kernels* row : table())
    if (fs::isa::usable(row->level, row->features)) {
      rows.insert(rows.begin(), row);
      names = std::string(row->name) + " " + names;
    }
  for (int i = 0; i < cases && failures < 20; ++i) check(rows);
  std::printf("%d cases of kl_loss; rows: %s; %d failures\n", cases, names.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
