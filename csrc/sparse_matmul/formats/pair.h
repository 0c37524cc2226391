// pair v1 (format 13): two packs of one weight f32[N,K], for layers that see now few rows of x and now many. Results do
// not depend on the format, so nothing but the time tells which of the two ran.
//
//   header        64 bytes (runtime/pack.h), dtype 2; block: the most rows of x that the first pack serves, at least 1;
//                 N, K, non-zeros: those of both packs
//   first pack    any other float32 layout, header and all; its size, in its own header, is a multiple of 64
//   second pack   likewise, of another layout, to the end
//
// N * K is at most 171 times the bytes, so that a reader may lay both packs out to compare them: what bitmap32 or
// panels128 is part of holds 9/8 of a byte per 192 weights at least.
#pragma once
#include "packed_format.h"

namespace fs::sparse_matmul::formats {

inline constexpr int kPair = 13;
inline constexpr int64_t kPairWeightsPerByte = 171;

// Takes apart the pack that serves `rows` rows of x. Empty if the headers and sizes are right; else what is wrong.
std::string view_pair(const PackHeader& header, const uint8_t* bytes, int64_t size, int64_t rows, Pack* out);

// Of a pair that view_pair() took: empty if both packs are sound and hold the same weight, bit for bit.
std::string pair_damage(const PackHeader& header, const uint8_t* bytes, int64_t size);

}  // namespace fs::sparse_matmul::formats
