// Scratch memory for the threads of a call, allocated before its parallel region: no exception may
// leave the region, and where memory is lacking nothing has been written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "isa.h"

namespace spectral {
namespace cpu {

// Bytes of each part of a thread's Scratch.
struct ScratchBytes {
  int64_t rows = 0, v = 0, gradient_v = 0, ritz = 0;
};

// MemoryError in Python.
class NoScratch : public std::bad_alloc {
 public:
  explicit NoScratch(int64_t n_bytes)
      : message_("no memory for " + std::to_string(n_bytes) + " bytes of scratch; nothing has " +
                 "been changed by this call") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// The scratch of up to n_threads threads, in one block.
class ScratchBlock {
 public:
  ScratchBlock(const ScratchBytes& bytes, int64_t n_threads)
      : bytes_(bytes),
        per_thread_(room(bytes.rows) + room(bytes.v) + room(bytes.gradient_v) + room(bytes.ritz)) {
    const int64_t n_bytes = per_thread_ * n_threads;
    if (n_bytes == 0) return;
    block_.reset(static_cast<char*>(::operator new(n_bytes + kLine, std::nothrow)));
    if (block_ == nullptr) throw NoScratch(n_bytes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(block_.get());
    first_ = block_.get() + (kLine - address % kLine);
  }

  // Returns the scratch of one more thread.
  Scratch take() noexcept {
    if (first_ == nullptr) return {};
    char* place = first_ + per_thread_ * taken_.fetch_add(1, std::memory_order_relaxed);
    Scratch scratch;
    scratch.rows = part(place, bytes_.rows);
    scratch.v = static_cast<float*>(part(place, bytes_.v));
    scratch.gradient_v = static_cast<float*>(part(place, bytes_.gradient_v));
    scratch.ritz = part(place, bytes_.ritz);
    return scratch;
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes of a cache line

  // What a part takes: whole lines, and one more, which no thread may touch.
  static constexpr int64_t room(int64_t n_bytes) {
    return n_bytes == 0 ? 0 : (n_bytes + 2 * kLine - 1) / kLine * kLine;
  }

  static void* part(char*& place, int64_t n_bytes) {
    if (n_bytes == 0) return nullptr;
    char* const own = place;
    place += room(n_bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(own + n_bytes, room(n_bytes) - n_bytes);
#endif
    return own;
  }

  struct Free {
    void operator()(char* block) const { ::operator delete(block); }
  };

  const ScratchBytes bytes_;
  const int64_t per_thread_;
  std::unique_ptr<char, Free> block_;
  char* first_ = nullptr;
  std::atomic<int64_t> taken_{0};
};

}  // namespace cpu
}  // namespace spectral
