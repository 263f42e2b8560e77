// Which choices of an expert are kept, and in which order: what the kernel of slots does with one expert of a group.
#pragma once

#include "launch.h"

namespace contrastive_ops {
namespace {

// Warps of a block and what each of them ranks; contrastive_ops/cuda/expert_routing.py says how many there are.
constexpr int kItemsPerWarp = 256, kMostWarps = 16;
// Choices of an expert that a warp orders by itself.
constexpr int kFew = 256;
// Bits of a priority that are looked at in one step, and of which choices are ordered in one.
constexpr int kChosenBits = 11, kOrderedBits = 8;
constexpr int kDigits = 1 << kOrderedBits;

// A counting sort of the items of each group, which are choices in their order.
struct Pass {
  int64_t items, blocks;  // of a group
  bool only_kept;         // of choices whose slot is not -1
};

struct Placement {
  const int64_t* experts;    // (T, k)
  const float* priority;     // (T,), or null: by position
  const int64_t* segment;    // (T,), or null
  int64_t* slots;            // (T, k)
  int64_t* order;            // (rows,)
  int64_t* offsets;          // (E + 1,)
  unsigned long long* kept;  // (segments, E), 0 before
  int32_t* listed;           // (T k,) choices by group and expert
  int32_t* other;            // (T k,) where rows are padded: as much room
  int32_t* starts;           // (groups, E) where the list of each begins
  int32_t* totals;           // (groups, E)
  int32_t* counts;           // (groups, blocks, E)
  int64_t k, capacity, groups, rows, segments;
  int E, cells_per_task;
  bool padded;       // every expert has a part of the rows for each group
  bool shared_kept;  // whether shared memory has room for the counts of kept choices
  Pass grouped, whole;

  __device__ int64_t label(int64_t choice) const {
    const int64_t found = segment == nullptr ? 0 : segment[choice / k];
    return found >= 0 && found < segments ? found : -1;
  }
};

// The expert of a choice; -1 where it has none, or has been dropped.
__device__ inline int expert_at(const Placement& p, const Pass& pass, int64_t choice) {
  if (pass.only_kept && p.slots[choice] < 0) return -1;
  const int64_t expert = p.experts[choice];
  return expert < p.E ? static_cast<int>(expert) : -1;
}

// Lanes of the warp before this one that have the same number below E, and all of them; -1 is none.
struct Peers {
  unsigned before, all;
};
__device__ inline Peers peers_of(int expert, int E) {
  unsigned same = kFullWarp;
  for (int bit = 0; E >> bit != 0; ++bit) {  // of expert + 1, which is 0 for none
    const bool set = (expert + 1) >> bit & 1;
    const unsigned have = __ballot_sync(kFullWarp, set);
    same &= set ? have : ~have;
  }
  const unsigned earlier = (1u << threadIdx.x % kWarp) - 1;
  return {same & earlier, same};
}

// The next place of an expert for each lane of a warp, in the order of lanes; -1 for none.
__device__ inline int32_t take_place(int expert, int E, int32_t* next_places) {
  const Peers peers = peers_of(expert, E);
  int32_t* next = next_places + expert;
  const int32_t place = expert < 0 ? -1 : *next + __popc(peers.before);
  __syncwarp();
  if (expert >= 0 && peers.before == 0) *next += __popc(peers.all);
  __syncwarp();
  return place;
}

// ---- Keys ---------------------------------------------------------------------------------------------------------

// Smaller for what an expert takes first: first choices before second ones, then the higher priority, NaN last. By
// bits, as the smallest numbers would count as 0.
__device__ inline uint64_t key_of(const Placement& p, int64_t choice) {
  unsigned descending = 0;
  if (p.priority != nullptr) {
    unsigned bits = __float_as_uint(p.priority[choice / p.k]);
    if (bits == 0x80000000u) bits = 0;                           // -0 is 0
    if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;  // NaN is -inf
    descending = bits >> 31 != 0 ? bits : ~(bits | 0x80000000u);
  }
  return static_cast<uint64_t>(choice % p.k) << 32 | descending;
}
// The bits of a key that may differ: from `low` to below `top`.
struct KeyBits {
  int low, top = 32;
  __device__ explicit KeyBits(const Placement& p) : low(p.priority == nullptr ? 32 : 0) {
    while ((p.k - 1) >> (top - 32) != 0) ++top;
  }
};

// ---- What becomes of a choice -------------------------------------------------------------------------------------

// The choices of one expert in a group.
struct Cell {
  const Placement& p;
  int64_t expert, base, n;  // `base`: its first row, where rows are padded
  int32_t *list, *other;

  __device__ Cell(const Placement& p, int64_t cell)
      : p(p),
        expert(cell % p.E),
        base((expert * p.groups + cell / p.E) * p.capacity),
        n(p.totals[cell]),
        list(p.listed + p.starts[cell]),
        other(p.other + p.starts[cell]) {}

  // A choice that `rank` others come before.
  __device__ void place(int64_t choice, int64_t rank) const {
    const bool kept = rank < p.capacity;
    if (!kept) p.slots[choice] = -1;
    if (!kept || !p.padded) return;
    p.slots[choice] = base + rank;
    p.order[base + rank] = choice;
    const int64_t label = p.segment == nullptr ? -1 : p.label(choice);
    if (label >= 0) atomicAdd(p.kept + label * p.E + expert, 1ull);
  }
  // Rows of no choice, and the count of the others where there are no segments, by threads of which this is one.
  __device__ void end(int thread, int threads) const {
    if (!p.padded) return;
    for (int64_t row = n + thread; row < p.capacity; row += threads) p.order[base + row] = -1;
    if (thread == 0 && p.segment == nullptr) {
      atomicAdd(p.kept + expert, static_cast<unsigned long long>(min(n, p.capacity)));
    }
  }
};

// By one warp, which compares each with each.
__device__ inline void order_few(const Cell& cell, uint64_t* keys) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, n = static_cast<int>(cell.n);
  // No two are equal: of equal keys the first in the list comes first.
  for (int i = lane; i < n; i += kWarp) keys[i] = key_of(cell.p, cell.list[i]) * kFew + i;
  __syncwarp();
  for (int i = lane; i < n; i += kWarp) {
    int rank = 0;
    for (int q = 0; q < n; ++q) rank += keys[q] < keys[i];
    cell.place(cell.list[i], rank);
  }
  cell.end(lane, kWarp);
}

// ---- Experts with many choices, by one block ----------------------------------------------------------------------

struct Bin {
  int32_t digit, above, count;  // how many are in those before it, and in it
};

// The bin of 2^bits in which the `wanted`-th is; all threads get it.
__device__ inline Bin bin_of(const int32_t* counts, int bits, int64_t wanted, Bin* found) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, each = ((1 << bits) + kWarp - 1) / kWarp;
  if (threadIdx.x < kWarp) {
    const int begin = min(lane * each, 1 << bits), end = min(begin + each, 1 << bits);
    int32_t own = 0;
    for (int d = begin; d < end; ++d) own += counts[d];
    int32_t up_to_own = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t earlier = __shfl_up_sync(kFullWarp, up_to_own, step);
      if (lane >= step) up_to_own += earlier;
    }
    int32_t above = up_to_own - own;
    if (above < wanted && wanted <= up_to_own) {
      int d = begin;
      while (above + counts[d] < wanted) above += counts[d++];
      *found = {d, above, counts[d]};
    }
  }
  __syncthreads();
  return *found;
}

// Drops all but the first `capacity` of a list: by digits from the top, of those that share all digits above.
__device__ inline void keep_some(const Cell& cell) {
  auto* counts = shared_memory<int32_t>();
  auto* found = reinterpret_cast<Bin*>(counts + (1 << kChosenBits));
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const KeyBits bits(cell.p);
  int shift = bits.top;
  uint64_t prefix = 0;
  int64_t wanted = cell.p.capacity;
  bool whole = wanted == 0;  // whether all that share the prefix have the same fate
  while (shift > bits.low && !whole) {
    const int width = min(kChosenBits, shift - bits.low), above = shift;
    for (int d = thread; d < 1 << width; d += threads) counts[d] = 0;
    __syncthreads();
    shift -= width;
    for (int64_t i = thread; i < cell.n; i += threads) {
      const uint64_t key = key_of(cell.p, cell.list[i]);
      if (key >> above == prefix) atomicAdd(counts + (key >> shift & ((1 << width) - 1)), 1);
    }
    __syncthreads();
    const Bin bin = bin_of(counts, width, wanted, found);
    prefix = prefix << width | static_cast<uint64_t>(bin.digit);
    wanted -= bin.above;
    whole = bin.count == wanted;
    __syncthreads();
  }
  // Of those that share it to the end, the first are kept.
  int64_t before = 0;
  for (int64_t tile = 0; tile < cell.n; tile += threads) {
    const int64_t i = tile + thread;
    const uint64_t key = i < cell.n ? key_of(cell.p, cell.list[i]) >> shift : 0;
    const bool shares = i < cell.n && key == prefix;
    const unsigned here = __ballot_sync(kFullWarp, shares);
    int64_t rank = before + __popc(here & ((1u << thread % kWarp) - 1));
    if (thread % kWarp == 0) counts[thread / kWarp] = __popc(here);
    __syncthreads();
    for (int warp = 0; warp < threads / kWarp; ++warp) {
      rank += warp < thread / kWarp ? counts[warp] : 0;
      before += counts[warp];
    }
    __syncthreads();
    const bool kept = key < prefix || (shares && rank < wanted);
    if (i < cell.n && !kept) cell.p.slots[cell.list[i]] = -1;
  }
}

// A stable counting sort by one digit: each warp has a part of the list.
__device__ inline void order_by_digit(const Cell& cell, const int32_t* from, int32_t* to, int shift) {
  auto* tables = shared_memory<int32_t>();  // (warps, digits)
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int32_t *own = tables + warp * kDigits, *starts = tables + warps * kDigits;
  const auto digit_of = [&](int64_t i) {
    return static_cast<int>(key_of(cell.p, from[i]) >> shift & static_cast<uint64_t>(kDigits - 1));
  };
  for (int d = static_cast<int>(threadIdx.x); d < warps * kDigits; d += threads) tables[d] = 0;
  __syncthreads();
  const int64_t part = ceil_divide(ceil_divide(cell.n, warps), kWarp) * kWarp;
  const int64_t begin = warp * part, end = min(begin + part, cell.n);
  for (int64_t i = begin + lane; i < end; i += kWarp) atomicAdd(own + digit_of(i), 1);
  __syncthreads();
  for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += threads) {
    int32_t total = 0;
    for (int each = 0; each < warps; ++each) {
      const int32_t count = tables[each * kDigits + d];
      tables[each * kDigits + d] = total;
      total += count;
    }
    starts[d] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t before = 0;
    for (int d = 0; d < kDigits; ++d) {
      const int32_t count = starts[d];
      starts[d] = before;
      before += count;
    }
  }
  __syncthreads();
  for (int64_t at = begin; at < end; at += kWarp) {
    const int64_t i = at + lane;
    const int digit = i < end ? digit_of(i) : -1;
    const int32_t place = take_place(digit, kDigits, own);
    if (digit >= 0) to[starts[digit] + place] = from[i];
  }
  __syncthreads();
}

__device__ inline void order_many(const Cell& cell) {
  const KeyBits bits(cell.p);
  int32_t *from = cell.list, *to = cell.other;
  for (int shift = bits.low; shift < bits.top; shift += kOrderedBits) {
    order_by_digit(cell, from, to, shift);
    int32_t* swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = threadIdx.x; i < cell.n; i += blockDim.x) cell.place(from[i], i);
  cell.end(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

// Shared memory of what follows.
inline size_t choose_bytes(int64_t warps) {
  const int64_t few = warps * kFew * static_cast<int64_t>(sizeof(uint64_t));
  const int64_t some = ((1 << kChosenBits) + 4) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t many = (warps + 1) * kDigits * static_cast<int64_t>(sizeof(int32_t));
  return static_cast<size_t>(max(few, max(some, many)));
}

// What experts keep, for some experts of a group: each warp one with few choices, then all warps those with many.
__device__ inline void choose_kept(const Placement& p, int64_t task) {
  const int64_t first = task * p.cells_per_task, end = min(first + p.cells_per_task, p.groups * p.E);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (first + warp < end) {
    const Cell own(p, first + warp);
    if (own.n <= kFew && (p.padded || own.n > p.capacity)) {
      order_few(own, shared_memory<uint64_t>() + warp * kFew);
    }
  }
  __syncthreads();
  for (int64_t at = first; at < end; ++at) {
    const Cell cell(p, at);
    if (cell.n <= kFew) continue;
    if (p.padded) {
      order_many(cell);
    } else if (cell.n > p.capacity) {
      keep_some(cell);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace contrastive_ops
