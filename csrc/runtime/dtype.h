// The float types at the boundary of a kernel. No STL: ISA files include this.
#pragma once

namespace fs {

enum class DType : int { f32, bf16, f16 };

}  // namespace fs
