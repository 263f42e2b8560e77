// Places of choices on a GPU, in one launch; nothing depends on the order of threads or blocks.
//
// Work is a list of tasks in phases; blocks take tasks in their order, and wait where those of an earlier phase have
// not ended. A block waits only for tasks that others have begun, so that it does not matter how many run at once.
//
//   count, scan, list    a stable counting sort of the choices of each group of tokens by expert
//   choose               for each expert of a group that has more than its capacity: which are kept. Only these are
//                        looked at: the bits of their priority, from the top, until the rest of those that share them
//                        is all kept or all dropped. In the padded layout, where rows are in this order, all are
//                        ordered
//   count, scan, place   a stable counting sort of what is kept into rows without gaps
//
// Without a capacity the last line is all, and padded experts have their rows after the first two.
#include "expert_routing.h"

#include "expert_routing_order.h"

namespace contrastive_ops {
namespace {

// ---- A stable counting sort ---------------------------------------------------------------------------------------

// Adds to the table of each warp (warps, E) how many of its items each expert has.
__device__ inline void count_items(const Placement& p, const Pass& pass, int64_t group, int64_t first,
                                   int32_t* tables) {
  const int threads = static_cast<int>(blockDim.x), warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int e = static_cast<int>(threadIdx.x); e < threads / kWarp * p.E; e += threads) tables[e] = 0;
  __syncthreads();
  const int64_t begin = first + warp * kItemsPerWarp, end = min(begin + kItemsPerWarp, pass.items);
  for (int64_t item = begin + threadIdx.x % kWarp; item < end; item += kWarp) {
    const int expert = expert_at(p, pass, group * pass.items + item);
    if (expert >= 0) atomicAdd(tables + warp * p.E + expert, 1);
  }
  __syncthreads();
}

__device__ inline void count(const Placement& p, const Pass& pass, int64_t task) {
  auto* tables = shared_memory<int32_t>();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  count_items(p, pass, task / pass.blocks, task % pass.blocks * warps * kItemsPerWarp, tables);
  for (int e = static_cast<int>(threadIdx.x); e < p.E; e += static_cast<int>(blockDim.x)) {
    int32_t total = 0;
    for (int warp = 0; warp < warps; ++warp) total += tables[warp * p.E + e];
    p.counts[task * p.E + e] = total;
  }
}

// Replaces each of the counts (groups, blocks, E) by the sum of those of earlier blocks of its group; totals (groups,
// E) are of all blocks. A task has 32 experts of a group, and each warp some of the blocks.
__device__ inline void scan(const Placement& p, const Pass& pass, int64_t task) {
  auto* sums = shared_memory<int32_t>();
  const int slices = static_cast<int>(blockDim.x) / kWarp;
  const int64_t parts = ceil_divide(p.E, kWarp), group = task / parts;
  const int64_t expert = task % parts * kWarp + threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t begin = slice * pass.blocks / slices, end = expert < p.E ? (slice + 1) * pass.blocks / slices : begin;
  int32_t* column = p.counts + group * pass.blocks * p.E + expert;
  int32_t sum = 0;
#pragma unroll 4
  for (int64_t block = begin; block < end; ++block) sum += column[block * p.E];
  sums[threadIdx.x] = sum;
  __syncthreads();
  int32_t before = 0, total = 0;
  for (int other = 0; other < slices; ++other) {
    const int32_t of_other = sums[other * kWarp + threadIdx.x % kWarp];
    before += other < slice ? of_other : 0;
    total += of_other;
  }
  for (int64_t block = begin; block < end; ++block) {
    const int32_t count = column[block * p.E];
    column[block * p.E] = before;
    before += count;
  }
  if (slice == 0 && expert < p.E) p.totals[group * p.E + expert] = total;
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

// Calls function(choice, expert, its place among the choices of the expert in the group) for the choices of a block; an
// expert of -1 is none.
template <class Function>
__device__ void rank_items(const Placement& p, const Pass& pass, int64_t task, int32_t* tables,
                           const Function& function) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t group = task / pass.blocks, first = task % pass.blocks * warps * kItemsPerWarp;
  count_items(p, pass, group, first, tables);
  // Where each warp begins with each expert.
  for (int e = static_cast<int>(threadIdx.x); e < p.E; e += static_cast<int>(blockDim.x)) {
    int32_t next = p.counts[task * p.E + e];
    for (int each = 0; each < warps; ++each) {
      const int32_t count = tables[each * p.E + e];
      tables[each * p.E + e] = next;
      next += count;
    }
  }
  __syncthreads();
  const int64_t begin = first + warp * kItemsPerWarp, end = min(begin + kItemsPerWarp, pass.items);
  for (int64_t at = begin; at < end; at += kWarp) {
    const int64_t item = at + lane, choice = item < end ? group * pass.items + item : -1;
    const int expert = choice < 0 ? -1 : expert_at(p, pass, choice);
    const int32_t place = take_place(expert, p.E, tables + warp * p.E);
    if (choice >= 0) function(choice, expert, place);
  }
}

// Choices by expert in each group, in their own order. All are kept until they are not.
__device__ inline void list(const Placement& p, const Pass& pass, int64_t task) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  auto* starts = shared_memory<int64_t>();  // (E), then a number of each warp
  const int64_t group = task / pass.blocks;
  scan_totals(p.totals + group * p.E, p.E, starts, starts + p.E);
  if (task % pass.blocks == 0) {
    for (int e = static_cast<int>(threadIdx.x); e < p.E; e += static_cast<int>(blockDim.x)) {
      p.starts[group * p.E + e] = static_cast<int32_t>(group * pass.items + starts[e]);
    }
  }
  rank_items(p, pass, task, reinterpret_cast<int32_t*>(starts + p.E + warps),
             [&](int64_t choice, int expert, int32_t place) {
               p.slots[choice] = expert < 0 ? -1 : 0;
               if (expert >= 0) p.listed[group * pass.items + starts[expert] + place] = static_cast<int32_t>(choice);
             });
}

// Choices that are kept, into rows.
__device__ inline void place(const Placement& p, const Pass& pass, int64_t task) {
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  auto* starts = shared_memory<int64_t>();  // (E), then a number of each warp
  auto* tables = reinterpret_cast<int32_t*>(starts + p.E + warps);
  int32_t* kept = tables + warps * p.E;
  for (int64_t c = threadIdx.x; p.shared_kept && c < p.segments * p.E; c += threads) kept[c] = 0;
  const int64_t taken = scan_totals(p.totals, p.E, starts, starts + p.E);
  rank_items(p, pass, task, tables, [&](int64_t choice, int expert, int32_t place) {
    const int64_t slot = expert < 0 ? -1 : starts[expert] + place;
    p.slots[choice] = slot;
    if (slot < 0) return;
    p.order[slot] = choice;
    const int64_t label = p.label(choice);
    if (label < 0) return;
    if (p.shared_kept) {
      atomicAdd(kept + label * p.E + expert, 1);
    } else {
      atomicAdd(p.kept + label * p.E + expert, 1ull);
    }
  });
  // Rows are only empty behind the last expert, and there are no more of them than items.
  const int64_t first = task * warps * kItemsPerWarp;
  for (int64_t row = max(taken, first) + threadIdx.x; row < min(first + warps * kItemsPerWarp, p.rows);
       row += threads) {
    p.order[row] = -1;
  }
  for (int e = static_cast<int>(threadIdx.x); task == 0 && e <= p.E; e += threads) {
    p.offsets[e] = e == p.E ? taken : starts[e];
  }
  if (!p.shared_kept) return;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.segments * p.E; c += threads) {
    if (kept[c] > 0) atomicAdd(p.kept + c, static_cast<unsigned long long>(kept[c]));
  }
}

// ---- All phases ---------------------------------------------------------------------------------------------------

enum class Phase { count, scan, list, choose, count_kept, scan_kept, place };
constexpr int kPhases = 7;

struct Tasks {
  int64_t ends[kPhases];  // of each phase, among all tasks
  int32_t* state;         // tasks that have been taken, and those that have ended; 0 before
};

__device__ inline void run(const Placement& p, Phase phase, int64_t task) {
  switch (phase) {
    case Phase::count:
      return count(p, p.grouped, task);
    case Phase::scan:
      return scan(p, p.grouped, task);
    case Phase::list:
      return list(p, p.grouped, task);
    case Phase::choose:
      return choose_kept(p, task);
    case Phase::count_kept:
      return count(p, p.whole, task);
    case Phase::scan_kept:
      return scan(p, p.whole, task);
    case Phase::place:
      return place(p, p.whole, task);
  }
}

__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    slots_kernel(const __grid_constant__ Placement p, const __grid_constant__ Tasks tasks) {
  auto* shared = shared_memory<int32_t>();
  for (int64_t e = threadIdx.x; blockIdx.x == 0 && p.padded && e <= p.E; e += blockDim.x) {
    p.offsets[e] = e * p.groups * p.capacity;
  }
  for (;;) {
    if (threadIdx.x == 0) *shared = atomicAdd(tasks.state, 1);
    __syncthreads();
    const int64_t task = *shared;
    int phase = 0;
    while (phase < kPhases && task >= tasks.ends[phase]) ++phase;
    if (phase == kPhases) return;
    const int64_t begin = phase == 0 ? 0 : tasks.ends[phase - 1];
    if (threadIdx.x == 0) {
      const volatile int32_t* ended = tasks.state + 1;
      while (*ended < begin) {
      }
      __threadfence();
    }
    __syncthreads();
    run(p, static_cast<Phase>(phase), task - begin);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(tasks.state + 1, 1);
    }
  }
}

// More blocks than a GPU has at once have nothing to do.
constexpr int64_t kMostSlotBlocks = 512;

}  // namespace

void expert_routing_slots(Stream stream, const int64_t* experts, const float* priority, const int64_t* segment,
                          int64_t* slots, int64_t* order, int64_t* offsets, int64_t* kept, int32_t* memory,
                          int32_t* state, Integers spec, Integers sizes) {
  const int64_t E = spec.data[0], capacity = spec.data[2], segments = spec.data[4];
  const int64_t groups = sizes.data[0], T = sizes.data[1], k = sizes.data[2], warps = sizes.data[4];
  const int64_t limited = capacity >= 0 ? groups : 0, size = groups > 0 ? T / groups : 0, span = warps * kItemsPerWarp;
  // Without items, the offsets are written all the same.
  const Pass grouped{size * k, max(ceil_divide(size * k, span), int64_t{1}), false};
  const Pass whole{T * k, max(ceil_divide(T * k, span), int64_t{1}), capacity >= 0};
  constexpr int64_t kMostSharedCounts = 4096;
  Placement p{};
  p.experts = experts;
  p.priority = priority;
  p.segment = segment;
  p.slots = slots;
  p.order = order;
  p.offsets = offsets;
  p.kept = reinterpret_cast<unsigned long long*>(kept);
  p.listed = memory;
  p.other = p.listed + (capacity >= 0 ? T * k : 0);
  p.starts = p.other + (spec.data[3] != 0 ? T * k : 0);
  p.totals = p.starts + max(groups, int64_t{1}) * E;
  p.counts = p.totals + max(groups, int64_t{1}) * E;
  p.k = k;
  p.capacity = capacity;
  p.groups = groups;
  p.rows = sizes.data[3];
  p.segments = segments;
  p.E = static_cast<int>(E);
  p.padded = spec.data[3] != 0;
  p.shared_kept = segments * E <= kMostSharedCounts;
  p.grouped = grouped;
  p.whole = whole;
  // A warp for each of several experts where they have few choices, else all warps for one.
  p.cells_per_task = size * k / max(E, int64_t{1}) <= kFew ? static_cast<int>(warps) : 1;
  const int64_t parts = ceil_divide(E, kWarp), again = p.padded ? 0 : 1;
  const int64_t each[kPhases] = {
      limited * grouped.blocks, limited * parts, limited * grouped.blocks, ceil_divide(limited * E, p.cells_per_task),
      again * whole.blocks,     again * parts,   again * whole.blocks};
  Tasks tasks{{}, state};
  int64_t all = 0, most = 1;
  for (int phase = 0; phase < kPhases; ++phase) {
    tasks.ends[phase] = all += each[phase];
    most = max(most, each[phase]);
  }
  if (all > INT32_MAX - kMostSlotBlocks) throw std::runtime_error("expert_routing_slots: there are too many groups");
  const size_t sort = static_cast<size_t>((E + warps) * 8 + warps * E * 4 + (p.shared_kept ? segments * E * 4 : 0));
  launch(slots_kernel, min(most, kMostSlotBlocks), static_cast<int>(warps) * kWarp, max(sort, choose_bytes(warps)),
         stream, p, tasks);
}

}  // namespace contrastive_ops
