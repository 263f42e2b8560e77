// The best of many scored columns: order, lists that are cut down to their k best, and sorting, by one block.
//
// A scored column is a key of 64 bits: the score in such a form that integers are in the order of the numbers, and then
// the column, the earlier the larger. So keys are in the order of the results, no two of a row are equal, and the k
// best are one set in whichever order threads have found them: entries of a list are in no order, and places in it are
// given out by integer atomics.
#pragma once

#include "launch.h"

namespace contrastive_ops {

// ---- Order ----------------------------------------------------------------------------------------------------------

// In the order of the scores; zeros of both signs are equal. Not for NaN.
__device__ inline uint32_t rank_of(float score) {
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float score_of_rank(uint32_t rank) {
  return __uint_as_float(rank >> 31 != 0 ? rank & 0x7fffffffu : ~rank);
}

__device__ inline uint64_t key_of(float score, int64_t column) {
  return uint64_t{rank_of(score)} << 32 | ~static_cast<uint32_t>(column);
}
__device__ inline float score_of(uint64_t key) { return score_of_rank(static_cast<uint32_t>(key >> 32)); }
__device__ inline int64_t column_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Below every key.
constexpr uint64_t kNoKey = 0;

// ---- The k-th best --------------------------------------------------------------------------------------------------

// Keys of one list. All threads of a block call `each` together, which calls function(key) for every key.
struct KeyList {
  const uint64_t* keys;
  const int* count;

  template <class Function>
  __device__ void each(const Function& function) const {
    for (int entry = static_cast<int>(threadIdx.x); entry < *count; entry += static_cast<int>(blockDim.x)) {
      function(keys[entry]);
    }
  }
};

// Keys of several lists, one behind another; a warp reads a list.
struct KeyLists {
  const uint64_t* keys;  // (lists, capacity)
  const int* counts;     // of each list
  int64_t capacity;
  int lists;

  template <class Function>
  __device__ void each(const Function& function) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    for (int list = static_cast<int>(threadIdx.x) / kWarp; list < lists; list += warps) {
      const int count = counts[list];
      for (int entry = static_cast<int>(threadIdx.x) % kWarp; entry < count; entry += kWarp) {
        function(keys[list * capacity + entry]);
      }
    }
  }

  // How many keys there are, by each warp.
  __device__ int64_t total() const {
    int64_t total = 0;
    for (int list = threadIdx.x % kWarp; list < lists; list += kWarp) total += counts[list];
    return fold_warp(total, [](int64_t a, int64_t b) { return a + b; });
  }
};

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

// Shared memory of last_key.
struct DigitCounts {
  uint64_t lowest[kWarp], highest[kWarp];  // of each warp
  int count[kDigits];
  int digit, above, equal;
};

__device__ inline int highest_bit(uint64_t x) {
  const auto upper = static_cast<int>(x >> 32);
  return upper != 0 ? 63 - __clz(upper) : 31 - __clz(static_cast<int>(x));
}

// Finds the digit of the wanted-th largest: `above` numbers have a larger digit, `equal` have this one. One warp.
__device__ inline void find_digit(DigitCounts& memory, int wanted) {
  constexpr int kOwn = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int first = kDigits - 1 - lane * kOwn;  // lanes go down from the largest digit
  int own = 0;
  for (int n = 0; n < kOwn; ++n) own += memory.count[first - n];
  int through = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, through, step);
    if (lane >= step) through += before;
  }
  if (through < wanted || through - own >= wanted) return;
  int digit = first, above = through - own;
  while (above + memory.count[digit] < wanted) above += memory.count[digit--];
  memory.digit = digit, memory.above = above, memory.equal = memory.count[digit];
}

// A number that exactly `wanted` of the keys are not below. There must be more keys than that.
//
// By digits from the highest bit in which keys differ at all: the keys of a list share a sign and most of an exponent,
// whose digits would take passes, with all threads at one counter, and tell nothing apart.
template <class Keys>
__device__ uint64_t last_key(const Keys& keys, int wanted, DigitCounts& memory) {
  uint64_t low = ~kNoKey, high = kNoKey;
  keys.each([&](uint64_t key) { low = key < low ? key : low, high = key > high ? key : high; });
  const auto lower = [](uint64_t a, uint64_t b) { return a < b ? a : b; };
  const auto higher = [](uint64_t a, uint64_t b) { return a > b ? a : b; };
  low = fold_warp(low, lower), high = fold_warp(high, higher);
  if (threadIdx.x % kWarp == 0) memory.lowest[threadIdx.x / kWarp] = low, memory.highest[threadIdx.x / kWarp] = high;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    low = lower(low, memory.lowest[warp]), high = higher(high, memory.highest[warp]);
  }
  int bit = highest_bit(low ^ high) + 1;  // of the lowest that is known
  uint64_t known = bit < 64 ? high >> bit : 0;
  for (;;) {
    const int bits = bit < kDigitBits ? bit : kDigitBits;
    const int shift = bit - bits;
    for (int digit = static_cast<int>(threadIdx.x); digit < kDigits; digit += static_cast<int>(blockDim.x)) {
      memory.count[digit] = 0;
    }
    __syncthreads();
    keys.each([&](uint64_t key) {
      if (key >> shift >> bits == known) atomicAdd(&memory.count[key >> shift & ((1u << bits) - 1)], 1);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(memory, wanted);
    __syncthreads();
    known = known << bits | static_cast<uint64_t>(memory.digit);
    wanted -= memory.above;
    bit = shift;
    if (memory.equal == wanted || bit == 0) return known << bit;
  }
}

// ---- One list -------------------------------------------------------------------------------------------------------

// Shared memory of a block that has a list.
struct ListMemory {
  DigitCounts digits;
  int count;  // keys in the list
  int kept;
};

// Leaves the k best of a list, which has more; returns what scores of later columns must exceed. All threads of a
// block, which know what the list has.
__device__ inline float shrink(uint64_t* keys, int k, ListMemory& memory) {
  const int count = memory.count;
  const uint64_t last = last_key(KeyList{keys, &memory.count}, k, memory.digits);
  if (threadIdx.x == 0) memory.kept = 0, memory.count = k;
  for (int first = 0; first < count; first += static_cast<int>(blockDim.x)) {
    const int entry = first + static_cast<int>(threadIdx.x);
    const uint64_t key = entry < count ? keys[entry] : kNoKey;
    __syncthreads();  // keys are moved to where others have just been read
    if (key >= last) keys[atomicAdd(&memory.kept, 1)] = key;
  }
  __syncthreads();
  return score_of(last);
}

// ---- Sorting --------------------------------------------------------------------------------------------------------

// Sorts the largest to the front; `size` is a power of two. All threads of a block.
template <class T>
__device__ void sort_descending(T* entries, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += static_cast<int>(blockDim.x)) {
        const int a = 2 * pair - (pair & (step - 1)), b = a + step;
        const T first = entries[a], second = entries[b];
        if ((first < second) == ((a & run) == 0)) entries[a] = second, entries[b] = first;
      }
    }
  }
  __syncthreads();
}

}  // namespace contrastive_ops
