// A family's table of kernels: what every select.cpp does with its rows.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "../families.h"
#include "isa.h"

namespace fs {

// Kernels has name, level and features; rows come best first, and the last one fits everywhere.
template <class Kernels>
class Table {
 public:
  template <int N>
  explicit constexpr Table(const Kernels* const (&rows)[N]) : rows_(rows), count_(N) {}

  // The first row that fits this CPU and the cap in force. Throws what isa::current_level() throws.
  const Kernels& select() const {
    for (const Kernels* row : *this)
      if ((pinned_ == nullptr || row == pinned_) && isa::usable(row->level, row->features))
        return row == spoiled_ ? copy_ : *row;
    return *rows_[count_ - 1];
  }

  std::vector<const Kernels*> all() const { return {begin(), end()}; }

  // The rows for `_C.kernels()`; tile(row) describes a row's register tile.
  template <class Tile>
  std::vector<KernelInfo> infos(const Tile& tile) const {
    std::vector<KernelInfo> out;
    const std::string selected = select().name;
    for (const Kernels* row : *this)
      out.push_back({"", row->name, isa::level_name(row->level), tile(*row), isa::usable(row->level, row->features),
                     row->name == selected, true});
    return out;
  }

  // Test hook behind `_C.spoil_kernel`: select() gives a copy of the row of this name after spoil_copy(copy); "" mends
  // it. Not to be called while kernels run.
  template <class Spoil>
  void spoil(const char* family, const std::string& name, const Spoil& spoil_copy) {
    spoiled_ = nullptr;
    if (name.empty()) return;
    for (const Kernels* row : *this) {
      if (name != row->name) continue;
      copy_ = *row;
      spoil_copy(copy_);
      spoiled_ = row;
      return;
    }
    throw std::invalid_argument("spoil_kernel: " + std::string(family) + " has no kernel named " + name);
  }

  // Test hook for a row that another of its level hides: select() gives it, if it is usable; "" ends it. Not to be
  // called while kernels run.
  void pin(const char* family, const std::string& name) {
    pinned_ = nullptr;
    if (name.empty()) return;
    for (const Kernels* row : *this)
      if (name == row->name) pinned_ = row;
    if (pinned_ == nullptr)
      throw std::invalid_argument("pin_kernel: " + std::string(family) + " has no kernel named " + name);
  }

  const Kernels& spoiled() const { return *spoiled_; }  // the row itself, unspoiled

 private:
  const Kernels* const* begin() const { return rows_; }
  const Kernels* const* end() const { return rows_ + count_; }

  const Kernels* const* rows_;
  int count_;
  const Kernels* spoiled_ = nullptr;
  const Kernels* pinned_ = nullptr;
  Kernels copy_{};
};

}  // namespace fs
