// The k best columns of every row on a GPU.
//
// A library multiplies; a tile of inner products passes from it to `filter_kernel`, which
// adds what is above each row's threshold to the row's list. So a score costs 4 bytes written and 4 read in the cache,
// and none in memory: at about 5 TB/s each way that is as long as multiplying 128 to 256 dimensions of 16-bit numbers.
// An H100 that reads at this speed has time for 20 instructions of a lane for each number. Nearly all numbers fail the
// threshold, which takes 6: a multiplication and addition, a maximum over the numbers of a thread, one comparison for
// all of these. What passes is looked at again, now with the rules.
#include "similarity_topk.h"

#include "launch.h"
#include "similarity_pairs.h"
#include "similarity_selection.h"

namespace contrastive_ops {
namespace {

constexpr int kThreads = 128, kPerThread = 8;
// On each multiprocessor: all that it has room for, as reading is what they wait for; fewer where logits take
// registers.
template <bool plain>
constexpr int kBlocks = plain ? 16 : 12;
// How many columns pass between two looks at whether the list still has room for as many more;
// contrastive_ops/cuda/similarity_topk.py has the same number.
constexpr int kLeg = kThreads * kPerThread;

// Inner products that are read at once.
constexpr int kWidth = kPack<float>;

// A tile of inner products, and which block reads what of it.
struct Tile {
  const float* dots;   // (rows, stride), of which cols are in use
  const float* guide;  // alike, or null
  int64_t first_row, first_col, cols, stride;
  int64_t parts, strip;
};

// What of a tile belongs to the list of this block.
struct Strip {
  int64_t row;                // of the matrix
  int64_t first_col;          // of the tile, in the matrix
  int begin, end;             // columns of the tile
  const float *dots, *guide;  // of the row

  __device__ explicit Strip(const Tile& tile) {
    const int64_t tile_row = blockIdx.x / tile.parts, first = blockIdx.x % tile.parts * tile.strip;
    row = tile.first_row + tile_row, first_col = tile.first_col;
    begin = static_cast<int>(first), end = static_cast<int>(min(first + tile.strip, tile.cols));
    dots = tile.dots + tile_row * tile.stride;
    guide = tile.guide == nullptr ? nullptr : tile.guide + tile_row * tile.stride;
  }

  __device__ int64_t column(int at) const { return first_col + at; }
  __device__ float dot_at(const PairArguments& p, int at) const {
    return p.code_scale == nullptr ? dots[at] : dots[at] * p.code_scale[column(at)];
  }
  __device__ bool dropped_at(const PairSet& set, float dot, int at) const {
    return set.drops && dropped(set, dot, guide == nullptr ? 0.0f : guide[at], row, column(at));
  }
};

// ---- Filter ---------------------------------------------------------------------------------------------------------

// Scores of one row. Where nothing but the inner product depends on the column, two numbers say all about it.
template <bool plain>
struct RowScores {
  const PairArguments& p;
  const PairSet& set;
  const Strip& strip;
  float factor = 1.0f, bias = 0.0f;

  __device__ RowScores(const PairArguments& p, const Strip& strip) : p(p), set(p.sets[0]), strip(strip) {
    if constexpr (plain) {
      factor = scale_factor(set, strip.row, 0);
      bias = p.row_bias == nullptr ? 0.0f : p.row_bias[strip.row];
      bias = set.negate ? -bias : bias;
    }
  }

  // `dot` is as the library made it.
  __device__ float operator()(float dot, int at) const {
    if constexpr (plain) return dot * factor + bias;
    if (p.code_scale != nullptr) dot *= p.code_scale[strip.column(at)];
    return logit_of(p, set, dot, strip.row, strip.column(at));
  }
};

// The column of the tile that is the n-th of a thread: neighbours in a warp read neighbouring packs.
__device__ inline int own_column(int leg, int n) {
  return leg + (n / kWidth * kThreads + static_cast<int>(threadIdx.x)) * kWidth + n % kWidth;
}

template <bool plain>
__global__ void __launch_bounds__(kThreads, kBlocks<plain>)
    filter_kernel(Tile tile, const __grid_constant__ PairArguments p, uint64_t* all_keys, int* counts,
                  float* thresholds, int64_t capacity, int k) {
  const Strip strip(tile);
  if (strip.begin >= strip.end) return;
  auto& memory = *shared_memory<ListMemory>();
  const RowScores<plain> score_of_dot(p, strip);
  uint64_t* keys = all_keys + blockIdx.x * capacity;
  float threshold = thresholds[blockIdx.x];
  if (threadIdx.x == 0) memory.count = counts[blockIdx.x];
  for (int leg = strip.begin; leg < strip.end; leg += kLeg) {
    Pack<float, kWidth> dots[kPerThread / kWidth];
#pragma unroll
    for (int n = 0; n < kPerThread; n += kWidth) {
      const int at = own_column(leg, n);
      dots[n / kWidth] = at < strip.end ? *reinterpret_cast<const Pack<float, kWidth>*>(strip.dots + at)
                                        : Pack<float, kWidth>{{NAN, NAN, NAN, NAN}};
    }
    __syncthreads();  // the count is complete
    if (memory.count > capacity - kLeg) threshold = shrink(keys, k, memory);
    float best = -INFINITY;
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int at = own_column(leg, n);
      // fmaxf passes over NaN, which is no score. Whatever a pack has behind the last column is sorted out below.
      if (plain || at < strip.end) best = fmaxf(best, score_of_dot(dots[n / kWidth].at[n % kWidth], at));
    }
    __syncthreads();  // all have seen the count
    if (!(best > threshold)) continue;
#pragma unroll 1
    for (int n = 0; n < kPerThread; ++n) {
      const int at = own_column(leg, n);
      if (at >= strip.end) break;
      const float score = score_of_dot(strip.dots[at], at);
      if (!(score > threshold) || strip.dropped_at(p.sets[0], strip.dot_at(p, at), at)) continue;
      keys[atomicAdd(&memory.count, 1)] = key_of(score, strip.column(at));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = memory.count, thresholds[blockIdx.x] = threshold;
}

// ---- Statistics -----------------------------------------------------------------------------------------------------

// Rows of the statistics: STATISTICS of contrastive_ops/core/rules.py.
enum Statistic : int { eligible, higher, kRules, kStatistics = kRules + static_cast<int>(Rule::size) };

// The first set of `p` is the one whose rules count.
__global__ void __launch_bounds__(kThreads)
    count_kernel(Tile tile, const __grid_constant__ PairArguments p, const float* level, int64_t* statistics) {
  const Strip strip(tile);
  const PairSet& set = p.sets[0];
  int* totals = shared_memory<int>();
  if (threadIdx.x < kStatistics) totals[threadIdx.x] = 0;
  int own[kStatistics] = {};
  const int64_t i = strip.row;
  for (int at = strip.begin + static_cast<int>(threadIdx.x); at < strip.end; at += kThreads) {
    const int64_t j = strip.column(at);
    const float dot = strip.dot_at(p, at), logit = logit_of(p, set, dot, i, j);
    const float guide_dot = strip.guide == nullptr ? 0.0f : strip.guide[at];
    own[eligible] += logit > -INFINITY && !strip.dropped_at(set, dot, at);
    own[higher] += logit > level[i];
    any_rule(set, dot, guide_dot, i, j, [&](int rule, bool drops) {
      own[kRules + rule] += drops;
      return false;
    });
  }
  __syncthreads();
  for (int name = 0; name < kStatistics; ++name) {
    const int total = fold_warp(own[name], [](int a, int b) { return a + b; });
    if (threadIdx.x % kWarp == 0) atomicAdd(&totals[name], total);
  }
  __syncthreads();
  if (threadIdx.x < kStatistics) statistics[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] += totals[threadIdx.x];
}

// ---- Select ---------------------------------------------------------------------------------------------------------

// Blocks of more threads sort long lists, and look through many of them.
constexpr int kLongList = 2048, kManyLists = 8, kMoreThreads = 512;
inline int threads_for(int64_t size, int64_t lists) {
  return size > kLongList || lists > kManyLists ? kMoreThreads : kThreads;
}

struct SelectMemory {
  DigitCounts digits;
  int kept;
};
constexpr size_t kSortedAt = (sizeof(SelectMemory) + 15) / 16 * 16;

__device__ inline void write(uint64_t key, int64_t at, float* values, int64_t* indices) {
  values[at] = key == kNoKey ? -INFINITY : score_of(key);
  indices[at] = key == kNoKey ? -1 : column_of(key);
}

// One block per row. Without a size the best are written as they are found.
template <class Keys>
__device__ void select(const Keys& lists, int64_t total, float* values, int64_t* indices, int64_t* found, int k,
                       int size) {
  auto& memory = *shared_memory<SelectMemory>();
  auto* sorted = reinterpret_cast<uint64_t*>(shared_memory<unsigned char>() + kSortedAt);
  const int64_t row = blockIdx.x;
  const uint64_t last = total > k ? last_key(lists, k, memory.digits) : kNoKey;
  if (threadIdx.x == 0) memory.kept = 0;
  __syncthreads();
  const auto place = [&](uint64_t key, int at) {
    if (size > 0) {
      sorted[at] = key;
    } else {
      write(key, row * k + at, values, indices);
    }
  };
  lists.each([&](uint64_t key) {
    if (key >= last) place(key, atomicAdd(&memory.kept, 1));
  });
  const int kept = static_cast<int>(total < k ? total : k);
  const int room = size > 0 ? size : k;
  for (int at = kept + static_cast<int>(threadIdx.x); at < room; at += static_cast<int>(blockDim.x)) place(kNoKey, at);
  if (threadIdx.x == 0) found[row] = kept;
  if (size == 0) return;
  sort_descending(sorted, size);
  for (int at = static_cast<int>(threadIdx.x); at < k; at += static_cast<int>(blockDim.x)) {
    write(at < size ? sorted[at] : kNoKey, row * k + at, values, indices);
  }
}

__global__ void select_kernel(const uint64_t* keys, const int* counts, float* values, int64_t* indices, int64_t* found,
                              int parts, int64_t capacity, int k, int size) {
  const int64_t first = int64_t{blockIdx.x} * parts;
  keys += first * capacity, counts += first;
  if (parts == 1) {
    select(KeyList{keys, counts}, *counts, values, indices, found, k, size);
  } else {
    const KeyLists lists{keys, counts, capacity, parts};
    select(lists, lists.total(), values, indices, found, k, size);
  }
}

// An entry of a list that somebody else made: any index, and the same one more than once.
struct Entry {
  int64_t index;
  uint32_t rank;  // 0 where there is none

  __device__ bool operator<(const Entry& other) const {
    return rank != other.rank ? rank < other.rank : index > other.index;
  }
};

__global__ void order_kernel(const float* values, const int64_t* indices, float* out_values, int64_t* out_indices,
                             int listed, int k, int size) {
  auto* entries = shared_memory<Entry>();
  const int64_t row = blockIdx.x;
  for (int at = static_cast<int>(threadIdx.x); at < size; at += static_cast<int>(blockDim.x)) {
    const float value = at < listed ? values[row * listed + at] : -INFINITY;
    const int64_t index = at < listed ? indices[row * listed + at] : -1;
    const bool known = index >= 0 && value > -INFINITY;
    entries[at] = known ? Entry{index, rank_of(value)} : Entry{-1, 0};
  }
  sort_descending(entries, size);
  for (int at = static_cast<int>(threadIdx.x); at < k; at += static_cast<int>(blockDim.x)) {
    const Entry entry = at < size ? entries[at] : Entry{-1, 0};
    out_values[row * k + at] = entry.rank == 0 ? -INFINITY : score_of_rank(entry.rank);
    out_indices[row * k + at] = entry.index;
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------

// The scores of `p` depend on a column by its inner products alone.
bool is_plain(const PairArguments& p) {
  return p.code_scale == nullptr && p.col_bias == nullptr && p.sets[0].scale_of != ScaleOf::columns &&
         p.sets[0].log_weight == nullptr;
}

}  // namespace

void similarity_topk_filter(Stream stream, const float* dots, const float* guide, const float* scale,
                            const float* row_bias, const float* col_bias, Arrays pair_data, Integers spec,
                            int64_t* keys, int32_t* counts, float* thresholds, int64_t N, int64_t M, int64_t first_row,
                            int64_t rows, int64_t first_col, int64_t cols, int64_t stride, int64_t parts, int64_t strip,
                            int64_t capacity, int64_t k) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, nullptr, N, M);
  const Tile tile{dots, guide, first_row, first_col, cols, stride, parts, strip};
  const auto run = [&](auto plain) {
    launch(filter_kernel<plain>, rows * parts, kThreads, sizeof(ListMemory), stream, tile, p,
           reinterpret_cast<uint64_t*>(keys), counts, thresholds, capacity, k);
  };
  is_plain(p) ? run(std::true_type()) : run(std::false_type());
}

void similarity_topk_count(Stream stream, const float* dots, const float* guide, const float* scale,
                           const float* row_bias, const float* col_bias, Arrays pair_data, Integers spec,
                           const float* level, int64_t* statistics, int64_t N, int64_t M, int64_t first_row,
                           int64_t rows, int64_t first_col, int64_t cols, int64_t stride, int64_t parts,
                           int64_t strip) {
  PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, nullptr, N, M);
  p.sets[0] = p.sets[p.set_count - 1];
  const Tile tile{dots, guide, first_row, first_col, cols, stride, parts, strip};
  launch(count_kernel, rows * parts, kThreads, kStatistics * sizeof(int), stream, tile, p, level, statistics);
}

void similarity_topk_select(Stream stream, const int64_t* keys, const int32_t* counts, float* values, int64_t* indices,
                            int64_t* found, int64_t rows, int64_t parts, int64_t capacity, int64_t k, int64_t size) {
  launch(select_kernel, rows, threads_for(size, parts), kSortedAt + size * sizeof(uint64_t), stream,
         reinterpret_cast<const uint64_t*>(keys), counts, values, indices, found, parts, capacity, k, size);
}

void similarity_topk_order(Stream stream, const float* values, const int64_t* indices, float* out_values,
                           int64_t* out_indices, int64_t rows, int64_t listed, int64_t k, int64_t size) {
  launch(order_kernel, rows, threads_for(size, 1), size * sizeof(Entry), stream, values, indices, out_values,
         out_indices, listed, k, size);
}

}  // namespace contrastive_ops
