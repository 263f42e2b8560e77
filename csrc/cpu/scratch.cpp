// Lists of free blocks by size, one of each for the process. Compiled once, for every processor.
//
// No object here has a destructor, so that threads may take memory while the process ends. Nobody waits for the lock:
// who does not get it asks the allocator, as the child of a fork does for ever if another thread held it then.
#include "scratch.h"

#include <stdint.h>
#include <stdlib.h>

#include <atomic>

#include "../huge_pages.h"

namespace contrastive_ops {
namespace {

constexpr size_t kLine = 64;       // in front of what is handed out: its size, and the next block of the list
#if defined(__SANITIZE_ADDRESS__)  // a sanitizer sees the bounds of fresh memory alone
constexpr size_t kMostKept = 0, kLargest = kMostKept / 4;
#else
constexpr size_t kMostKept = size_t{64} << 20, kLargest = kMostKept / 4;
#endif
constexpr int kSteps = 4;  // sizes from one power of two to the next: a quarter is lost at most
constexpr int kSizes = 4 * 24;

struct Block {
  Block* next;
  size_t bytes;  // with this line
  int size;      // the list that it belongs to
};
static_assert(sizeof(Block) <= kLine, "a block is described by one line");

std::atomic_flag locked = ATOMIC_FLAG_INIT;
Block* lists[kSizes];
size_t kept = 0;

// Whether the lock was had within the time that others take to hang a block in or out.
bool acquire() {
  for (int attempt = 0; attempt < 64; ++attempt) {
    if (!locked.test_and_set(std::memory_order_acquire)) return true;
  }
  return false;
}
void release() { locked.clear(std::memory_order_release); }

Block* take_kept(int size) {
  if (!acquire()) return nullptr;
  Block* block = lists[size];
  if (block) {
    lists[size] = block->next;
    kept -= block->bytes;
  }
  release();
  return block;
}
bool keep(Block* block) {
  if (!acquire()) return false;
  const bool fits = kept + block->bytes <= kMostKept;
  if (fits) {
    block->next = lists[block->size];
    lists[block->size] = block;
    kept += block->bytes;
  }
  release();
  return fits;
}

// The number of the smallest size that holds `bytes`, which become that size.
int size_of(size_t& bytes) {
  size_t step = kLine;
  int number = 0;
  for (; bytes > 2 * kSteps * step; step *= 2) number += kSteps;
  const size_t steps = (bytes + step - 1) / step;
  bytes = steps * step;
  return number + static_cast<int>(steps) - 1;
}

void* data_of(Block* block) { return reinterpret_cast<char*>(block) + kLine; }

}  // namespace

void* take_scratch(size_t bytes) {
  if (bytes > SIZE_MAX - 2 * kLine) return nullptr;
  bytes += kLine;
  int size = -1;
  if (bytes <= kLargest) {
    size = size_of(bytes);
    if (Block* block = take_kept(size)) return data_of(block);
  }
  void* fresh = nullptr;
  if (posix_memalign(&fresh, kLine, bytes) != 0) return nullptr;
  use_huge_pages(fresh, bytes);
  Block* block = static_cast<Block*>(fresh);
  *block = {nullptr, bytes, size};
  return data_of(block);
}

void give_scratch(void* data) {
  if (!data) return;
  Block* block = reinterpret_cast<Block*>(static_cast<char*>(data) - kLine);
  if (block->size < 0 || !keep(block)) free(block);
}

size_t release_scratch() {
  Block* all = nullptr;
  if (!acquire()) return 0;
  const size_t bytes = kept;
  for (Block*& list : lists) {
    while (Block* block = list) {
      list = block->next;
      block->next = all;
      all = block;
    }
  }
  kept = 0;
  release();
  while (Block* block = all) {
    all = block->next;
    free(block);
  }
  return bytes;
}

}  // namespace contrastive_ops
