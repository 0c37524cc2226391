// For the functions of entries/ that Python calls: errors come back as text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#define FS_ENTRY __attribute__((visibility("default")))

namespace fs::simt {

const char* kept(const std::string& text);  // valid until the next call

template <class Body>
const char* guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return kept(error.what());
  }
}

}  // namespace fs::simt
