// See topk.h. Both sweeps are one kernel, so that a pair has the same score, to the last bit, in both. Of its scores a
// thread looks at the largest of each row first: in the second sweep hardly any reaches the threshold of its row.
#include "topk.h"

#include "../similarity_selection.h"
#include "rules.h"

namespace contrastive_ops {
namespace hopper {
namespace {

constexpr int kCols = 192, kStages = 4, kColumns = kCols / 4;
// Groups of a tile where there are more than one: the columns of each of the four threads that share a row.
constexpr int kQuarters = 4, kThreads = 128;

template <class T>
struct alignas(1024) Shared {
  Stages<T, kCols, kStages> stages;
};

struct TopKTask {
  float* maxima;                    // of the first sweep; null in the second
  const float *thresholds, *floor;  // null for none
  uint64_t* keys;
  int* counts;
  int groups, of_tile, capacity;
};

struct TopKEpilogue {
  const SweepPairs& p;
  const TopKTask& task;
  using Sums = float[2][kCols / 2];

  __device__ void operator()(Sums& sums, const TilePlace& tile, int) const {
    const Own<kCols> own(tile);
    multiply_factors(p, own, sums);
    const Drops<kCols> drops(p, own, sums);
    make_logits(p, own, drops, 1.0f, sums);
    float best[4];
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      best[r] = kNoLogit;  // fmaxf passes over NaN, which is no score
      CONTRASTIVE_OPS_UNROLL
      for (int c = 0; c < kColumns; ++c) best[r] = fmaxf(best[r], own.number(sums, r, c));
    }
    if (task.maxima != nullptr) {
      write_maxima(tile, own, best);
    } else {
      list_columns(sums, own, best);
    }
  }
  __device__ void finish() const {}

 private:
  __device__ void write_maxima(const TilePlace& tile, const Own<kCols>& own, float (&best)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = own.row_of(r);
      float largest = best[r];
      if (task.of_tile == 1) largest = fold_row_lanes(largest, [](float a, float b) { return fmaxf(a, b); });
      if (row >= p.rows || lane >= task.of_tile) continue;
      task.maxima[int64_t{row} * task.groups + tile.col_tile * task.of_tile + lane] = largest;
    }
  }

  __device__ void list_columns(Sums& sums, const Own<kCols>& own, const float (&best)[4]) const {
    CONTRASTIVE_OPS_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = min(own.row_of(r), p.rows - 1);  // pairs of others are left out
      const float least = task.thresholds == nullptr ? kNoLogit : task.thresholds[row];
      const float floor = task.floor == nullptr ? kNoLogit : task.floor[p.first_row + row];
      const auto passes = [&](float score) { return score >= least && score > floor; };
      if (!passes(best[r])) continue;
      uint64_t passing = 0;
      CONTRASTIVE_OPS_UNROLL
      for (int c = 0; c < kColumns; ++c) passing |= uint64_t{passes(own.number(sums, r, c))} << c;
#pragma unroll 1
      while (passing != 0) {
        const int column = highest_bit(passing);
        passing ^= uint64_t{1} << column;
        float score = 0.0f;  // registers have no index
        CONTRASTIVE_OPS_UNROLL
        for (int c = 0; c < kColumns; ++c) score = c == column ? own.number(sums, r, c) : score;
        const int place = atomicAdd(&task.counts[row], 1);
        if (place >= task.capacity) continue;
        task.keys[int64_t{row} * task.capacity + place] = key_of(score, own.col_of(column));
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    topk_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
                const __grid_constant__ SweepPairs p, const __grid_constant__ TopKTask task, const Plan plan) {
#ifdef CONTRASTIVE_OPS_HAS_HOPPER
  auto& shared = shared_tiles<Shared<T>>();
  sweep<T, kCols, kStages>(&x, &y, plan, shared.stages, TopKEpilogue{p, task});
#endif
}

// The largest scores of a row's groups as keys; a group without a pair has one below all others.
struct Maxima {
  const float* of_row;
  int groups;

  template <class Function>
  __device__ void each(const Function& function) const {
    for (int group = static_cast<int>(threadIdx.x); group < groups; group += static_cast<int>(blockDim.x)) {
      function(key_of(of_row[group], group));
    }
  }
};

// A block finds the threshold of a row, which k groups reach: -inf where fewer have a pair.
__global__ void __launch_bounds__(kThreads)
    find_thresholds_kernel(const float* maxima, float* thresholds, int groups, int k) {
  auto& memory = *shared_memory<DigitCounts>();
  const uint64_t last = last_key(Maxima{maxima + int64_t{blockIdx.x} * groups, groups}, k, memory);
  if (threadIdx.x == 0) thresholds[blockIdx.x] = score_of(last);
}

}  // namespace
}  // namespace hopper

void hopper_topk(Stream stream, Input x, Input y, int64_t D, int64_t first_row, int64_t rows, Arrays pair_data,
                 Integers spec, const float* scale, const float* row_bias, const float* col_bias, int64_t N, int64_t M,
                 int64_t k, const float* floor, int64_t groups, float* maxima, float* thresholds, int64_t* keys,
                 int32_t* counts, int64_t capacity) {
  using namespace hopper;
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, nullptr, N, M);
  const SweepPairs pairs = sweep_pairs(p, first_row, rows);
  if (rows == 0 || M == 0) return;
  const Plan plan(rows, M, D, kCols);
  const int64_t of_tile = groups / plan.col_tiles;
  if (groups != 0 && (groups != of_tile * plan.col_tiles || (of_tile != 1 && of_tile != kQuarters) || groups <= k)) {
    throw std::invalid_argument("groups: there must be 0, or more than k, which are 1 or 4 for each tile of columns");
  }
  if (k < 1 || capacity < 1 || capacity > M) {
    throw std::invalid_argument("k and capacity: they must be at least 1, and lists not longer than there are columns");
  }
  TopKTask task{};
  task.maxima = maxima, task.groups = static_cast<int>(groups), task.of_tile = static_cast<int>(of_tile);
  const auto run = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      const TensorMap of_x = tensor_map(x.as<T>() + first_row * D, x.dtype, rows, D, D, kRows);
      const TensorMap of_y = tensor_map(y.data, y.dtype, M, D, D, kCols / kCluster);
      launch_clusters(topk_kernel<T>, plan.tiles(), kBlockThreads, sizeof(Shared<T>), stream, of_x, of_y, pairs, task,
                      plan);
    } else {
      throw std::invalid_argument("x: it must be of 16 bits");
    }
  };
  if (groups > 0) {
    with_type(x.dtype, run);
    launch(find_thresholds_kernel, rows, kThreads, sizeof(DigitCounts), stream, maxima, thresholds, task.groups,
           static_cast<int>(k));
    task.thresholds = thresholds;
  }
  task.maxima = nullptr, task.floor = floor;
  task.keys = reinterpret_cast<uint64_t*>(keys), task.counts = counts, task.capacity = static_cast<int>(capacity);
  with_type(x.dtype, run);
}

}  // namespace contrastive_ops
