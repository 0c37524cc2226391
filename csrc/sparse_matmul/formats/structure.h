// Where a sparse float32 weight W[N,K] is not zero, without its values: for training. Its values f32[nonzeros] lie
// beside it in the order of CSR (by row, then column); a value's *place* is its number there.
//
// structure v1 (format 15, dtype 2, block 128), little-endian, the same on every ISA level; every section begins at a
// multiple of 64, the gaps are zero. C = ceil(N/256) chunks of rows, B = ceil(K/128) blocks of columns.
//   u64 bytes[2]               of the two packs below
//   u8  order[C][B][2][256]    rows of the chunk in descending order of non-zeros in this block (ties: ascending; all
//   of
//                              0 .. 255, also those >= N), then their numbers of non-zeros
//   u32 start[C][B][256]       by row in that order: the place of its first value in this block; 0 if there is none
//   u8  index[nonzeros]        column % 128, by place
//   u8  zero[512]              room
//   pack                       panels128 (panels128.h) of W with labels in the place of values: the bits of the label
//   of
//                              place i are 0x00800000 + i, a positive normal float, so that no label is a zero
//   pack                       the same of W^T[K,N], with the same labels
// So whatever panels128 looks like, a pass over the labels gives the values in its order; what is no label (padding,
// room) gives 0. 11 bytes a non-zero, padding of panels128, and 1.5 KB per 256 x 128 weights.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../../runtime/pack.h"
#include "../sparse_matmul.h"
#include "../training.h"

namespace fs::sparse_matmul {

// One of the two packs. Kernels read `pack` with its value pointer set to `floats` floats, made from the labels.
struct LabelledPack {
  Pack pack;
  const uint32_t* label;
  int64_t floats;
};

// A structure, taken apart.
struct StructureView {
  int64_t n, k, nonzeros;
  const uint8_t* order;
  const uint32_t* start;
  const uint8_t* index;
  LabelledPack forward, transposed;
};

inline constexpr uint32_t kFirstLabel = 0x00800000;
inline constexpr int64_t kMaxPlaces = 0x7f800000 - int64_t{kFirstLabel};  // non-zeros of a structure at most

namespace formats {

inline constexpr int kStructure = 15;

// A matrix in CSR as the caller gives it; nothing of it has been checked.
struct Csr {
  const int64_t* crow;  // [n + 1]
  const int64_t* col;   // [nonzeros]
  int64_t n, k, nonzeros;
};

// Empty if crow runs from 0 to nonzeros without descending and every row's columns ascend inside K; else what is wrong.
std::string check_csr(const Csr& csr);

// The structure of a matrix that has passed check_csr(), with at most kMaxPlaces non-zeros.
std::vector<uint8_t> pack_structure(const Csr& csr);

// Takes a structure apart. Empty if headers and sizes are right; else what is wrong, for "... must be a structure: ".
std::string view_structure(const uint8_t* bytes, int64_t size, StructureView* out);

// The header of a structure of so many bytes.
PackHeader structure_header(int64_t n, int64_t k, int64_t nonzeros, int64_t size);

// The same of a structure in the memory of a GPU by its header alone; `bytes` is not read, and of the two packs nothing
// is set.
std::string view_tables(const PackHeader& header, const uint8_t* bytes, int64_t size, StructureView* out);

// As view_structure(), then every byte: empty only for what pack_structure() writes. crow and col: as check_csr()
// wants.
std::string read_structure(const uint8_t* bytes, int64_t size, std::vector<int64_t>* crow, std::vector<int64_t>* col);

}  // namespace formats
}  // namespace fs::sparse_matmul
