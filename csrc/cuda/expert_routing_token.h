// One token's logits in the registers of a team of threads; what the scores of a router and their derivative share.
//
// A thread has runs of eight consecutive experts, 16 or 32 bytes each. A team is a part of a warp that just holds a
// token's experts, so that most of what is done to a token needs few exchanges or none; tokens with more than 1,024
// experts have a block of their own.
#pragma once

#include "launch.h"

namespace contrastive_ops {
namespace {

constexpr int kRun = 8;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNever = -kInfinity;
constexpr float kLowest = -3.4028234663852886e38f;
constexpr int kTeamThreads = 128, kMostTeamThreads = 256;

struct Router {
  Input logits;  // (T, E)
  const float* noise;
  const float* bias;
  const bool* allowed;
  const int64_t* given;
  const int64_t* segment;
  const bool* valid;
  int64_t T;
  int E, k, groups, kept_groups, segments;
  bool sigmoid, renormalize, top2, load;
  float sigma;
  bool wide_logits, wide_floats, wide_mask;  // whether runs of logits, of float32 (T, E), and of the mask are aligned

  Router(Input logits, const float* noise, const float* bias, const bool* allowed, const int64_t* given,
         const int64_t* segment, const bool* valid, Integers spec, int64_t T, int64_t E, double sigma)
      : logits(logits),
        noise(noise),
        bias(bias),
        allowed(allowed),
        given(given),
        segment(segment),
        valid(valid),
        T(T),
        E(static_cast<int>(E)),
        k(static_cast<int>(spec.data[0])),
        groups(static_cast<int>(spec.data[3])),
        kept_groups(static_cast<int>(spec.data[4])),
        segments(static_cast<int>(spec.data[6])),
        sigmoid(spec.data[1] == 1),
        renormalize(spec.data[2] != 0),
        top2(spec.data[5] == 0),
        load(spec.data[7] != 0),
        sigma(static_cast<float>(sigma)),
        wide_logits(is_aligned16(logits.data) && E % (logits.dtype == DType::float32 ? 4 : 8) == 0),
        wide_floats(is_aligned16(noise) && E % 4 == 0),
        wide_mask(reinterpret_cast<uintptr_t>(allowed) % kRun == 0 && E % kRun == 0) {}

  __device__ int label(int64_t token) const {
    if (segment == nullptr) return 0;
    const int64_t found = segment[token];
    return found >= 0 && found < segments ? static_cast<int>(found) : -1;
  }
};

// ---- Teams --------------------------------------------------------------------------------------------------------

struct Two {
  float a, b;
};
template <class T>
__device__ T flipped(T value, int step) {
  return __shfl_xor_sync(kFullWarp, value, step);
}
__device__ inline Two flipped(Two value, int step) { return {flipped(value.a, step), flipped(value.b, step)}; }

struct Plus {
  __device__ float operator()(float x, float y) const { return x + y; }
  __device__ Two operator()(Two x, Two y) const { return {x.a + y.a, x.b + y.b}; }
};
struct Greater {
  template <class T>
  __device__ T operator()(T x, T y) const {
    return y > x ? y : x;
  }
};
// The largest two of two numbers and two others; each has the larger one first.
struct LargestTwo {
  __device__ Two operator()(Two x, Two y) const { return {fmaxf(x.a, y.a), fmaxf(fmaxf(x.b, y.b), fminf(x.a, y.a))}; }
};

// Some threads of a warp, 1, 2, 4, ... or 32: as many as `lanes` says, or kLanes of them if that is not 0. All threads
// of a warp call each function together.
template <int kLanes>
struct WarpTeam {
  static constexpr int kStages = kLanes == 0 ? 5 : 0;  // at most, of what joins the teams of a warp
  static constexpr int kThreads = kTeamThreads;
  int lane, index, count, unit;  // `index` of `count` teams in the block, in the warp `unit`

  __device__ WarpTeam(void*, int lanes)
      : index(static_cast<int>(threadIdx.x) / (kLanes == 0 ? lanes : kLanes)), count(kThreads), lanes_(lanes) {
    lane = static_cast<int>(threadIdx.x) - index * size();
    count /= size();
    unit = static_cast<int>(threadIdx.x) / kWarp;
  }
  __device__ int size() const { return kLanes == 0 ? lanes_ : kLanes; }
  __device__ int owner(int run) const { return run & (size() - 1); }

  template <class T, class Function>
  __device__ T fold(T value, const Function& function) const {
    for (int step = size() / 2; step > 0; step /= 2) value = function(value, flipped(value, step));
    return value;
  }
  __device__ bool any(bool x) const {
    const int first = static_cast<int>(threadIdx.x) % kWarp - lane;
    return (__ballot_sync(kFullWarp, x) >> first & (kFullWarp >> (kWarp - size()))) != 0;
  }
  // Whether it holds for any of the tokens that take part in the next exchange.
  __device__ bool any_token(bool x) const { return __any_sync(kFullWarp, x) != 0; }
  __device__ float from(float value, int of) const { return __shfl_sync(kFullWarp, value, of, size()); }
  __device__ void sync() const { __syncwarp(); }

 private:
  int lanes_;
};

// All threads of a block.
struct BlockTeam {
  static constexpr int kStages = 0;
  static constexpr int kThreads = kMostTeamThreads;
  int lane = static_cast<int>(threadIdx.x), index = 0, count = 1, unit = 0;
  void* scratch;  // a number of up to 8 bytes of each warp

  __device__ BlockTeam(void* scratch, int) : scratch(scratch) {}
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int owner(int run) const { return run % size(); }

  template <class T, class Function>
  __device__ T fold(T value, const Function& function) const {
    for (int step = kWarp / 2; step > 0; step /= 2) value = function(value, flipped(value, step));
    T* each = static_cast<T*>(scratch);
    if (lane % kWarp == 0) each[lane / kWarp] = value;
    __syncthreads();
    value = each[0];
    for (int warp = 1; warp < size() / kWarp; ++warp) value = function(value, each[warp]);
    __syncthreads();
    return value;
  }
  __device__ bool any(bool x) const { return fold(static_cast<int>(x), Greater()) != 0; }
  __device__ bool any_token(bool x) const { return x; }
  __device__ float from(float value, int of) const {
    if (lane == of) *static_cast<float*>(scratch) = value;
    __syncthreads();
    value = *static_cast<float*>(scratch);
    __syncthreads();
    return value;
  }
  __device__ void sync() const { __syncthreads(); }
};

// The expert of a thread's item.
template <class Team>
__device__ int expert_of(const Team& team, int item) {
  return item / kRun * kRun * team.size() + team.lane * kRun + item % kRun;
}
// The thread that has an expert, any thread for none.
template <class Team>
__device__ int owner_of(const Team& team, int expert) {
  return team.owner(max(expert, 0) / kRun);
}
// Where tables of a team of `size` have an expert: next to those of other threads, so that no two want the same bank of
// memory.
__device__ inline int place_of_expert(int size, int expert) {
  return (expert / (kRun * size) * kRun + expert % kRun) * size + expert / kRun % size;
}

// ---- Runs of numbers ----------------------------------------------------------------------------------------------

// The first `count` of eight numbers, the rest `fill`; `wide`: at a multiple of 16 bytes, and no pack in part.
template <class T>
__device__ void load_run(const T* from, int count, bool wide, float fill, float* to) {
  if (wide) {
#pragma unroll
    for (int first = 0; first < kRun; first += kPack<T>) {
      Pack16<T> values;
      if (first < count) values = *reinterpret_cast<const Pack16<T>*>(from + first);
#pragma unroll
      for (int q = 0; q < kPack<T>; ++q) to[first + q] = first < count ? to_float(values.at[q]) : fill;
    }
  } else {
#pragma unroll
    for (int q = 0; q < kRun; ++q) to[q] = q < count ? to_float(from[q]) : fill;
  }
}

template <class T>
__device__ void store_run(const float* from, int count, bool wide, T* to) {
  if (wide) {
#pragma unroll
    for (int first = 0; first < kRun; first += kPack<T>) {
      if (first >= count) return;
      Pack16<T> values;
#pragma unroll
      for (int q = 0; q < kPack<T>; ++q) values.at[q] = from_float<T>(from[first + q]);
      *reinterpret_cast<Pack16<T>*>(to + first) = values;
    }
  } else {
#pragma unroll
    for (int q = 0; q < kRun; ++q) {
      if (q < count) to[q] = from_float<T>(from[q]);
    }
  }
}

// What a thread has of a row of E numbers; nothing but `fill` if it is not `real`.
template <class Team, int N, class T>
__device__ void load_row(const Team& team, const T* row, int E, bool real, bool wide, float fill, float (&to)[N]) {
#pragma unroll
  for (int first = 0; first < N; first += kRun) {
    const int expert = expert_of(team, first);
    load_run(row + expert, real ? E - expert : 0, wide, fill, to + first);
  }
}

// ---- A token ------------------------------------------------------------------------------------------------------

// Items beyond the last expert are blocked, like experts that the token must not choose: their logits are -inf. A token
// that is not routed has only those, and one that is not valid is not read.
template <class Team, int N, bool kNoise>
struct Token {
  const Team& team;
  const Router& p;
  float z[N];
  float noisy[kNoise ? N : 1];
  bool live;

  __device__ Token(const Team& team, const Router& p, int64_t token) : team(team), p(p) {
    const bool real = token < p.T && (p.valid == nullptr || p.valid[token]);
    const int64_t row = real ? token * p.E : 0;
    if (p.logits.dtype == DType::float32) {
      load_row(team, static_cast<const float*>(p.logits.data) + row, p.E, real, p.wide_logits, kNever, z);
    } else if (p.logits.dtype == DType::bfloat16) {
      load_row(team, static_cast<const BFloat16*>(p.logits.data) + row, p.E, real, p.wide_logits, kNever, z);
    } else {
      load_row(team, static_cast<const Float16*>(p.logits.data) + row, p.E, real, p.wide_logits, kNever, z);
    }
    if (p.allowed != nullptr) block(p.allowed + row, real);
    bool some = false;
#pragma unroll
    for (int i = 0; i < N; ++i) some |= z[i] != kNever;
    live = team.any(some);
    if constexpr (kNoise) {
      load_row(team, p.noise + row, p.E, real, p.wide_floats, 0.0f, noisy);
      // Not fused, so that choices are those of every other backend.
#pragma unroll
      for (int i = 0; i < N; ++i) {
        noisy[i] = z[i] == kNever ? kNever : __fadd_rn(z[i], __fmul_rn(p.sigma, noisy[i]));
      }
    }
  }

  __device__ void block(const bool* allowed, bool real) {
#pragma unroll
    for (int first = 0; first < N; first += kRun) {
      const int expert = expert_of(team, first), count = real ? p.E - expert : 0;
      Pack<bool, kRun> may{};
      if (p.wide_mask) {
        if (count > 0) may = *reinterpret_cast<const Pack<bool, kRun>*>(allowed + expert);
      } else {
#pragma unroll
        for (int q = 0; q < kRun; ++q) may.at[q] = q < count && allowed[expert + q];
      }
#pragma unroll
      for (int q = 0; q < kRun; ++q) {
        if (!may.at[q]) z[first + q] = kNever;
      }
    }
  }

  // The logits that experts are chosen by.
  __device__ float chosen_by(int item) const {
    if constexpr (kNoise) {
      return noisy[item];
    } else {
      return z[item];
    }
  }
  // That of one expert, for all threads; any number for none.
  __device__ float chosen_by_of(int expert) const {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) found = expert_of(team, i) == expert ? chosen_by(i) : found;
    return team.from(found, owner_of(team, expert));
  }
};

// ---- Distributions ------------------------------------------------------------------------------------------------

__device__ inline float sigmoid_of(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }
__device__ inline float log_sigmoid_of(float z) { return fminf(z, 0.0f) - __logf(1.0f + __expf(-fabsf(z))); }

// Density times a polynomial in 1 / (1 + 0.3 |u|), relative error 3e-7; as in csrc/cpu/expert_scores.h.
__device__ inline float normal_cdf(float u) {
  const float t = fabsf(u), w = __fdividef(1.0f, 1.0f + 0.3f * t);
  float tail = w * -0.021055348f + 0.11473752f;
  tail = tail * w - 0.2335104f;
  tail = tail * w + 0.19867313f;
  tail = tail * w - 0.08498841f;
  tail = tail * w + 0.099044755f;
  tail = tail * w + 0.077429526f;
  tail = tail * w + 0.110432126f;
  tail = tail * w + 0.11954933f;
  tail = tail * w + 0.11968778f;
  tail = tail * w * __expf(-0.5f * t * t);
  return u > 0.0f ? 1.0f - tail : tail;
}

// A softmax of numbers of which those that are blocked are -inf. A row with NaN or +inf has NaN everywhere.
struct Softmax {
  float largest, second, share, log_total;
  float mean;  // of the distance to the largest number
  __device__ float operator()(float logit) const { return __expf(logit - largest) * share; }
  __device__ float entropy() const { return log_total - mean; }
};

// Replaces numbers by their softmax.
template <class Team, int N>
__device__ Softmax take_softmax(const Team& team, float (&q)[N]) {
  Two top = {kNever, kNever};
#pragma unroll
  for (int i = 0; i < N; ++i) top = {fmaxf(top.a, q[i]), fmaxf(top.b, fminf(q[i], top.a))};
  top = team.fold(top, LargestTwo());
  Two sum = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float below = q[i] - top.a, term = __expf(below);
    sum.a += term;
    sum.b += term * (q[i] == kNever ? 0.0f : below);
    q[i] = term;
  }
  sum = team.fold(sum, Plus());
  const float share = 1.0f / sum.a;
#pragma unroll
  for (int i = 0; i < N; ++i) q[i] *= share;
  return {top.a, top.b, share, logf(sum.a), sum.b * share};
}

// The same of the logarithms of sigmoids, if the scores are sigmoids: those scaled to sum to 1, without 0 / 0.
template <class Team, int N>
__device__ Softmax take_distribution(const Team& team, const Router& p, float (&q)[N]) {
  if (p.sigmoid) {
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = log_sigmoid_of(q[i]);
  }
  return take_softmax(team, q);
}

// A row with +inf has a logsumexp, but no probabilities.
template <class Team, int N>
__device__ float logsumexp_of(const Team& team, const Softmax& s, const float (&z)[N]) {
  const float lse = s.largest + s.log_total;
  if (!team.any_token(s.largest == kInfinity)) return lse;
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < N; ++i) is_nan |= z[i] != z[i];
  is_nan = team.any(is_nan);
  return s.largest == kInfinity && !is_nan ? kInfinity : lse;
}

// Finite, so that the last choice itself is at distance 0.
__device__ inline float inverse_sigma(const Router& p) { return fminf(1.0f / p.sigma, 1e30f); }

// ---- Which kernel -------------------------------------------------------------------------------------------------

// Blocks that a multiprocessor has registers for: loads of others go on while one of them computes.
template <int N, bool kNoise>
constexpr int kBlocksAtOnce = N > kRun ? 1 : (kNoise ? 4 : 5);

// Calls function(Team type, items, whether there is noise) with the kernel's template arguments.
template <class Team, int N>
struct TeamOf {
  using Type = Team;
  static constexpr int kItems = N;
};
template <class Function>
void with_noise(bool noise, const Function& function) {
  noise ? function(std::true_type()) : function(std::false_type());
}
template <class Function>
void with_team(int64_t lanes, int64_t items, const Function& function) {
  if (lanes > kWarp && lanes <= kMostTeamThreads && items == 16) return function(TeamOf<BlockTeam, 16>());
  if (lanes == kWarp && items == 32) return function(TeamOf<WarpTeam<kWarp>, 32>());
  if (lanes == kWarp && items == 16) return function(TeamOf<WarpTeam<kWarp>, 16>());
  if (lanes <= kWarp && kWarp % lanes == 0 && items == kRun) return function(TeamOf<WarpTeam<0>, kRun>());
  throw std::runtime_error("expert_routing: no kernel for " + std::to_string(lanes) + " threads with " +
                           std::to_string(items) + " experts each");
}
inline int threads_of(int64_t lanes) { return lanes > kWarp ? static_cast<int>(lanes) : kTeamThreads; }
inline int64_t tokens_at_once(int64_t lanes) { return lanes > kWarp ? 1 : kTeamThreads / lanes; }

}  // namespace
}  // namespace contrastive_ops
