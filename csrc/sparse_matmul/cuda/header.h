// What a pack's header must say, held against the bytes on the device: a launcher takes a pack apart by what its caller
// says of it, since to read the header the host would have to wait for the stream. Whatever the caller says, no kernel
// reads outside of the pack; where it is not true, results are NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../runtime/pack.h"

namespace fs::sparse_matmul::sm80 {

// The words of a header that are to be compared: from its beginning, `count` of them. With 0 anything holds.
struct HeaderIs {
  static constexpr int kShape = 8, kNonzeros = 10;  // up to K; up to the number of non-zeros
  const uint32_t* there;                            // the pack, on the device
  uint32_t words[kNonzeros];
  int count;
};

inline HeaderIs header_is(const void* pack, const PackHeader& header, int count) {
  HeaderIs is{static_cast<const uint32_t*>(pack), {}, count};
  std::memcpy(is.words, &header, sizeof is.words);
  return is;
}

}  // namespace fs::sparse_matmul::sm80
