#include "families.h"

#include <stdexcept>

#include "int8_gemm/select.h"
#include "kl_loss/select.h"
#include "qdq/select.h"
#include "runtime/workspace.h"
#include "sparse_matmul/int8_select.h"
#include "sparse_matmul/select.h"

#define FS_STRING_OF(x) #x
#define FS_STRING(x) FS_STRING_OF(x)

namespace fs {
namespace {

constexpr Family kFamilies[] = {
    {"int8_gemm", &int8_gemm::kernel_infos, &int8_gemm::spoil},
    {"qdq", &qdq::kernel_infos, &qdq::spoil},
    {"kl_loss", &kl_loss::kernel_infos, &kl_loss::spoil},
    {"sparse_matmul", &sparse_matmul::kernel_infos, &sparse_matmul::spoil},
    {"sparse_int8", &sparse_matmul::int8::kernel_infos, &sparse_matmul::int8::spoil},  // a table of its own
};

}  // namespace

std::map<std::string, std::string> build_info() {
  return {
      {"version", FS_STRING(FASTSPARSE_VERSION)},
      {"built_with_torch", FS_STRING(FASTSPARSE_BUILT_WITH_TORCH)},
      {"compiler", __VERSION__},
      {"cuda", FS_STRING(FASTSPARSE_CUDA_VERSION)},  // "off", or the toolkit's version
      {"sanitize", FASTSPARSE_SANITIZE},             // "none", or what -fsanitize was given
  };
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> all;
  for (const Family& family : kFamilies)
    for (KernelInfo& info : family.kernels()) {
      info.family = family.name;
      all.push_back(std::move(info));
    }
  return all;
}

int64_t scratch_allocations() { return allocation_count().load(); }

void spoil_kernel(const std::string& family, const std::string& name) {
  for (const Family& row : kFamilies)
    if (family == row.name) return row.spoil(name);
  throw std::invalid_argument("spoil_kernel: there is no family named " + family);
}

void pin_sparse_int8(const std::string& name) { sparse_matmul::int8::pin(name); }

void pin_sparse_matmul(const std::string& name) { sparse_matmul::pin(name); }

}  // namespace fs
