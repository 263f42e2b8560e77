// Sums over the tokens of each segment, in an order that depends on the sizes alone.
//
// A warp (or the block, where it is one team) has a table that only it writes, and every number of it has one thread.
// Where a warp has several tokens, threads add up their own numbers in registers for as long as tokens are of the same
// segment: runs of equal labels cost one addition per number, and a change of the label one reduction across the warp.
#pragma once

#include "expert_routing_token.h"

namespace contrastive_ops {
namespace {

// A table has `kinds` arrays of a team's items, as place_of_expert says, and then three totals, for each segment.
__host__ __device__ inline int64_t table_width(int kinds, int64_t lanes, int64_t items) {
  return kinds * lanes * items + 3;
}

// Adds the numbers of all teams of a warp to a table: each step halves what a thread has to add until it is one number.
// A function of its own, as it is rarely needed and would take registers from all that is around it.
template <int kStages, int N>
CONTRASTIVE_OPS_NOINLINE __device__ void add_across(float* table, int lanes, float (&values)[N]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int first = 0, count = N;
  bool writes = true;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    const int step = lanes << stage, half = N >> (stage + 1);
    if (step >= kWarp) break;
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + flipped(given, step);
    }
    if (half > 0) {
      count = half;
      first += upper ? half : 0;
    } else {
      values[0] += flipped(values[0], step);
      writes = writes && !upper;
    }
  }
  float* to = table + first * lanes + (lane & (lanes - 1));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (writes && i < count) to[i * lanes] += values[i];
  }
}

template <class Team, int N, int kKinds>
class Sums {
 public:
  __device__ Sums(const Team& team, float* table, int64_t width, int kinds)
      : team_(team), table_(table), width_(width), kinds_(kinds) {}

  // Says of which segment the next token is, and whether it counts.
  __device__ void begin(bool counts, int label) {
    counts_ = counts;
    label_ = label;
    if constexpr (!kDirect) {
      const unsigned here = __ballot_sync(kFullWarp, counts);
      if (here == 0) return;
      const int first = __shfl_sync(kFullWarp, label, __ffs(static_cast<int>(here)) - 1);
      mixed_ = __any_sync(kFullWarp, counts && label != first) != 0;
      if (!mixed_ && first != current_) {
        flush();
        current_ = first;
      }
    }
  }

  template <int kind>
  __device__ void add(const float (&values)[N]) {
    if constexpr (kDirect) {
      if (!counts_) return;
      float* to = array_of(label_, kind) + team_.lane;
#pragma unroll
      for (int i = 0; i < N; ++i) to[i * team_.size()] += values[i];
    } else if (mixed_) {
      for_labels([&](int label, bool own) {
        float part[N];
#pragma unroll
        for (int i = 0; i < N; ++i) part[i] = own ? values[i] : 0.0f;
        add_across<Team::kStages>(array_of(label, kind), team_.size(), part);
      });
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) own_[kind][i] += counts_ ? values[i] : 0.0f;
    }
  }

  __device__ void add_totals(const float (&values)[3]) {
    if constexpr (kDirect) {
      if (!counts_ || team_.lane != 0) return;
      for (int q = 0; q < 3; ++q) total_at(label_, q) += values[q];
    } else if (mixed_) {
      for_labels([&](int label, bool own) {
        for (int q = 0; q < 3; ++q) add_total_across(label, q, own ? values[q] : 0.0f);
      });
    } else {
      for (int q = 0; q < 3; ++q) own_totals_[q] += counts_ ? values[q] : 0.0f;
    }
  }

  // Adds what is in registers to the table.
  __device__ void flush() {
    if constexpr (!kDirect) {
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        if (kind >= kinds_) break;
        float part[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          part[i] = own_[kind][i];
          own_[kind][i] = 0.0f;
        }
        add_across<Team::kStages>(array_of(current_, kind), team_.size(), part);
      }
      for (int q = 0; q < 3; ++q) {
        add_total_across(current_, q, own_totals_[q]);
        own_totals_[q] = 0.0f;
      }
    }
  }

 private:
  // One token at a time: every number of the table has one thread anyway.
  static constexpr bool kDirect = Team::kStages == 0;

  __device__ float* array_of(int label, int kind) { return table_ + label * width_ + kind * team_.size() * N; }
  __device__ float& total_at(int label, int q) { return table_[(label + int64_t{1}) * width_ - 3 + q]; }

  // Calls function(label, whether the own token has it) for each label in the warp.
  template <class Function>
  __device__ void for_labels(const Function& function) {
    for (unsigned left = __ballot_sync(kFullWarp, counts_); left != 0;) {
      const int label = __shfl_sync(kFullWarp, label_, __ffs(static_cast<int>(left)) - 1);
      const bool own = counts_ && label_ == label;
      left &= ~__ballot_sync(kFullWarp, own);
      function(label, own);
    }
  }

  // The same of a number that all threads of a team have.
  __device__ void add_total_across(int label, int q, float value) {
    for (int step = team_.size(); step < kWarp; step *= 2) value += flipped(value, step);
    if (threadIdx.x % kWarp == 0) total_at(label, q) += value;
  }

  const Team& team_;
  float* table_;
  int64_t width_;
  int kinds_;  // of the table, at most kKinds
  bool counts_ = false, mixed_ = false;
  int label_ = 0, current_ = 0;
  float own_[kDirect ? 1 : kKinds][kDirect ? 1 : N] = {};
  float own_totals_[kDirect ? 1 : 3] = {};
};

}  // namespace
}  // namespace contrastive_ops
