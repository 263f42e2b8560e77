// Places of choices on a GPU: a stable counting sort by expert, in which nothing depends on the order of threads.
//
// Items are choices in the order in which they are placed, in blocks. One kernel counts those of each expert in each
// block, the next adds up the counts of earlier blocks, and the last ranks the items of a block in their order, a warp
// at a time. Two reads of 8 bytes per choice and one write of 8 to each of two arrays; integers are added atomically,
// which is exact in any order.
#include "expert_routing.h"

#include "launch.h"

namespace contrastive_ops {
namespace {

constexpr int kMostScanThreads = 1024;

// How choices are placed.
//
// By turn: positions among the choices of an expert in a group of `size` tokens, all first choices before all second
// ones, tokens in their `turn`; those from `capacity` on have no place. `padded`: every expert has a part of the rows
// for each group, and positions are rows in there. Otherwise (no capacity, or `only_kept`: of the choices that have a
// place already): in their own order into rows without gaps.
struct Placement {
  const int64_t* experts;                     // (T, k)
  const int64_t* turn;                        // (groups, size), or null
  int64_t* slots;                             // (T, k)
  int64_t size, k, capacity, groups, blocks;  // `blocks` of items in each group
  int E;
  bool by_turn, padded, only_kept;
};

// Warps of a block and what each of them ranks; with more experts there is room for fewer tables.
constexpr int kItemsPerWarp = 256;
__host__ __device__ constexpr int warps_of(int64_t E) { return E <= 1024 ? 8 : E <= 2048 ? 4 : E <= 4096 ? 2 : 1; }

__device__ inline int64_t choice_at(const Placement& p, int64_t group, int64_t item) {
  if (!p.by_turn) return item;
  const int64_t token = item % p.size, first = group * p.size;
  return (first + (p.turn == nullptr ? token : p.turn[first + token])) * p.k + item / p.size;
}

// The expert of a choice; -1 where it has none, or has been dropped.
__device__ inline int expert_at(const Placement& p, int64_t choice) {
  if (p.only_kept && p.slots[choice] < 0) return -1;
  const int64_t expert = p.experts[choice];
  return expert < p.E ? static_cast<int>(expert) : -1;
}

// Adds to the table of each warp (warps, E) how many of its items each expert has.
__device__ inline void count_items(const Placement& p, int64_t group, int64_t first, int64_t items, int32_t* tables) {
  const int threads = static_cast<int>(blockDim.x), warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int e = static_cast<int>(threadIdx.x); e < threads / kWarp * p.E; e += threads) tables[e] = 0;
  __syncthreads();
  const int64_t begin = first + warp * kItemsPerWarp;
  for (int64_t item = begin + threadIdx.x % kWarp; item < min(begin + kItemsPerWarp, items); item += kWarp) {
    const int expert = expert_at(p, choice_at(p, group, item));
    if (expert >= 0) atomicAdd(tables + warp * p.E + expert, 1);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(8 * kWarp) count_kernel(Placement p, int32_t* counts) {
  auto* tables = shared_memory<int32_t>();
  const int64_t group = blockIdx.x / p.blocks, warps = blockDim.x / kWarp;
  count_items(p, group, blockIdx.x % p.blocks * warps * kItemsPerWarp, p.size * p.k, tables);
  for (int e = static_cast<int>(threadIdx.x); e < p.E; e += static_cast<int>(blockDim.x)) {
    int32_t total = 0;
    for (int warp = 0; warp < warps; ++warp) total += tables[warp * p.E + e];
    counts[int64_t{blockIdx.x} * p.E + e] = total;
  }
}

// Replaces each of the counts (groups, blocks, E) by the sum of those of earlier blocks of its group; totals (groups,
// E) are of all blocks. A block has 32 experts of a group, and each of its warps some of the blocks.
__global__ void __launch_bounds__(kMostScanThreads)
    scan_kernel(int32_t* counts, int32_t* totals, int64_t blocks, int64_t E) {
  auto* sums = shared_memory<int32_t>();
  const int slices = static_cast<int>(blockDim.x) / kWarp;
  const int64_t parts = ceil_divide(E, kWarp), group = blockIdx.x / parts;
  const int64_t expert = blockIdx.x % parts * kWarp + threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t begin = slice * blocks / slices, end = expert < E ? (slice + 1) * blocks / slices : begin;
  int32_t* column = counts + group * blocks * E + expert;
  int32_t sum = 0;
#pragma unroll 4
  for (int64_t block = begin; block < end; ++block) sum += column[block * E];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int32_t before = 0, total = 0;
  for (int other = 0; other < slices; ++other) {
    const int32_t of_other = sums[other * kWarp + threadIdx.x % kWarp];
    before += other < slice ? of_other : 0;
    total += of_other;
  }
  for (int64_t block = begin; block < end; ++block) {
    const int32_t count = column[block * E];
    column[block * E] = before;
    before += count;
  }
  if (slice == 0 && expert < E) totals[group * E + expert] = total;
}

// starts[e] becomes the sum of totals of experts before e; returns that of all. `sums`: a number of each warp.
__device__ inline int64_t scan_totals(const int32_t* totals, int E, int64_t* starts, int64_t* sums) {
  const int threads = static_cast<int>(blockDim.x), each = (E + threads - 1) / threads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, E), end = min(begin + each, E);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t own = 0;
  for (int e = begin; e < end; ++e) own += totals[e];
  int64_t up_to_own = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t earlier = __shfl_up_sync(kFullWarp, up_to_own, step);
    if (lane >= step) up_to_own += earlier;
  }
  if (lane == kWarp - 1) sums[warp] = up_to_own;
  __syncthreads();
  int64_t before = up_to_own - own, all = 0;
  for (int other = 0; other < threads / kWarp; ++other) {
    before += other < warp ? sums[other] : 0;
    all += sums[other];
  }
  for (int e = begin; e < end; ++e) {
    starts[e] = before;
    before += totals[e];
  }
  __syncthreads();
  return all;
}

struct Places {
  const int32_t* counts;     // (groups, blocks, E) of earlier blocks
  const int32_t* totals;     // (groups, E)
  int64_t* order;            // (rows,); null where rows are not known yet
  int64_t* offsets;          // (E + 1,); written where rows have no gaps
  const int64_t* segment;    // (T,), or null
  unsigned long long* kept;  // (segments, E), 0 before; null where rows are not known yet
  int64_t rows, segments;
  bool shared_kept;  // whether shared memory has room for the counts of kept choices
};

// Lanes of the warp before this one that have the same expert, and all of them.
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

__global__ void __launch_bounds__(8 * kWarp) place_kernel(Placement p, Places out) {
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  auto* starts = shared_memory<int64_t>();  // (E), then a number of each warp
  auto* tables = reinterpret_cast<int32_t*>(starts + p.E + warps);
  int32_t* kept = tables + warps * p.E;
  const int64_t group = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks, items = p.size * p.k;
  const int64_t first = block * warps * kItemsPerWarp;
  if (out.shared_kept) {
    for (int64_t c = threadIdx.x; c < out.segments * p.E; c += threads) kept[c] = 0;
  }
  const bool without_gaps = !p.by_turn;
  const int64_t taken = without_gaps ? scan_totals(out.totals, p.E, starts, starts + p.E) : 0;
  count_items(p, group, first, items, tables);
  // Where each warp begins with each expert.
  for (int e = static_cast<int>(threadIdx.x); e < p.E; e += threads) {
    int32_t next = out.counts[int64_t{blockIdx.x} * p.E + e];
    for (int each = 0; each < warps; ++each) {
      const int32_t count = tables[each * p.E + e];
      tables[each * p.E + e] = next;
      next += count;
    }
  }
  __syncthreads();

  const int64_t begin = first + warp * kItemsPerWarp, end = min(begin + kItemsPerWarp, items);
  for (int64_t at = begin; at < end; at += kWarp) {
    const int64_t item = at + lane, choice = item < end ? choice_at(p, group, item) : -1;
    const int expert = choice < 0 ? -1 : expert_at(p, choice);
    const Peers peers = peers_of(expert, p.E);
    int32_t* next = tables + warp * p.E + expert;
    int64_t slot = expert < 0 ? -1 : *next + __popc(peers.before);
    __syncwarp();
    if (expert >= 0 && peers.before == 0) *next += __popc(peers.all);
    __syncwarp();
    if (choice < 0) continue;
    if (expert >= 0 && without_gaps) slot += starts[expert];
    if (!without_gaps && slot >= p.capacity) slot = -1;
    if (slot >= 0 && p.padded) slot += (expert * p.groups + group) * p.capacity;
    p.slots[choice] = slot;
    if (slot < 0 || out.order == nullptr) continue;
    out.order[slot] = choice;
    const int64_t label = out.segment == nullptr ? 0 : out.segment[choice / p.k];
    if (label < 0 || label >= out.segments) continue;
    if (out.shared_kept) {
      atomicAdd(kept + label * p.E + expert, 1);
    } else {
      atomicAdd(out.kept + label * p.E + expert, 1ull);
    }
  }
  if (without_gaps) {
    // Rows are only empty behind the last expert, and there are no more of them than items.
    for (int64_t row = max(taken, first) + threadIdx.x; row < min(first + warps * kItemsPerWarp, out.rows);
         row += threads) {
      out.order[row] = -1;
    }
    for (int e = static_cast<int>(threadIdx.x); blockIdx.x == 0 && e <= p.E; e += threads) {
      out.offsets[e] = e == p.E ? taken : starts[e];
    }
  }
  if (!out.shared_kept) return;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < out.segments * p.E; c += threads) {
    if (kept[c] > 0) atomicAdd(out.kept + c, static_cast<unsigned long long>(kept[c]));
  }
}

}  // namespace

void expert_routing_slots(Stream stream, const int64_t* experts, const int64_t* turn, const int64_t* segment,
                          int64_t* slots, int64_t* order, int64_t* offsets, int64_t* kept, int32_t* counts,
                          int32_t* totals, Integers spec, Integers sizes, bool by_turn, bool only_kept) {
  const int64_t E = spec.data[0], groups = by_turn ? sizes.data[0] : 1, rows = sizes.data[3];
  const int64_t size = sizes.data[1] / groups, k = sizes.data[2], segments = spec.data[4];
  const int warps = warps_of(E);
  // Without items, the offsets are written all the same.
  const int64_t blocks = max(ceil_divide(size * k, int64_t{warps} * kItemsPerWarp), int64_t{1});
  const Placement placement{experts,
                            turn,
                            slots,
                            size,
                            k,
                            spec.data[2],
                            groups,
                            blocks,
                            static_cast<int>(E),
                            by_turn,
                            by_turn && spec.data[3] != 0,
                            only_kept};
  constexpr int64_t kMostSharedCounts = 4096;
  const bool shared_kept = order != nullptr && segments * E <= kMostSharedCounts;
  const Places places{counts, totals,   order,      offsets, segment, reinterpret_cast<unsigned long long*>(kept),
                      rows,   segments, shared_kept};
  const size_t tables = static_cast<size_t>(warps * E) * sizeof(int32_t);
  const size_t more = static_cast<size_t>(E + warps) * sizeof(int64_t) +
                      (shared_kept ? static_cast<size_t>(segments * E) * sizeof(int32_t) : 0);
  launch(count_kernel, groups * blocks, warps * kWarp, tables, stream, placement, counts);
  const int threads = static_cast<int>(min(blocks * kWarp, int64_t{kMostScanThreads}));
  launch(scan_kernel, groups * ceil_divide(E, kWarp), threads, static_cast<size_t>(threads) * sizeof(int32_t), stream,
         counts, totals, blocks, E);
  launch(place_kernel, groups * blocks, warps * kWarp, tables + more, stream, placement, places);
}

}  // namespace contrastive_ops
