// Scores of a router on a GPU: choices, gates, and the sums of all losses and metrics from one read of the logits.
//
// Bound by memory: 2 to 4 bytes per logit, and 8 to 12 per choice. A constant number of blocks has tokens next to each
// other; each writes one row of sums, and a second kernel adds the rows in their order and makes losses of them.
#include "expert_routing.h"

#include "expert_routing_sums.h"
#include "expert_routing_totals.h"

namespace contrastive_ops {
namespace {

struct ScoresOut {
  int64_t* experts;
  float* gates;
  float* priority;
  int32_t* state;  // of the kernels that follow, which begin with 0
  int64_t state_size;
};

// ---- Choices ------------------------------------------------------------------------------------------------------

// What experts are chosen by: -inf for those that must not be, the lowest number for NaN.
template <class Team, int N, bool kNoise>
__device__ void make_keys(const Token<Team, N, kNoise>& token, const Softmax& chosen, float (&keys)[N]) {
  const Router& p = token.p;
  // Logits are in the order of their scores, and have not been rounded once more.
  const bool by_logit = p.bias == nullptr && p.groups == 1;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float logit = token.chosen_by(i);
    float key = by_logit ? logit : p.sigmoid ? sigmoid_of(logit) : chosen(logit);
    if (p.bias != nullptr) {
      const int expert = expert_of(token.team, i);
      key = __fadd_rn(key, expert < p.E ? p.bias[expert] : 0.0f);
    }
    keys[i] = token.z[i] == kNever ? kNever : key == key ? key : kLowest;
  }
}

// Leaves the keys of the best groups of experts; `memory` has E + 2 groups floats of the team.
template <class Team, int N>
__device__ void drop_groups(const Team& team, const Router& p, float* memory, float (&keys)[N]) {
  float *row = memory, *value = row + p.E, *kept = value + p.groups;
  const int members = p.E / p.groups;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (expert_of(team, i) < p.E) row[expert_of(team, i)] = keys[i];
  }
  team.sync();
  for (int group = team.lane; group < p.groups; group += team.size()) {
    Two top = {kNever, kNever};
    for (int q = 0; q < members; ++q) {
      const float key = row[group * members + q];
      top = {fmaxf(top.a, key), fmaxf(top.b, fminf(key, top.a))};
    }
    // Two experts with NaN must not make a group that has none.
    value[group] = p.top2 && top.b > kNever ? fmaxf(top.a + top.b, kLowest) : top.a;
  }
  team.sync();
  for (int group = team.lane; group < p.groups; group += team.size()) {
    int better = 0;
    for (int q = 0; q < p.groups; ++q) better += value[q] > value[group] || (value[q] == value[group] && q < group);
    kept[group] = better < p.kept_groups && value[group] > kNever ? 1.0f : 0.0f;
  }
  team.sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = expert_of(team, i);
    if (expert < p.E && kept[expert / members] == 0.0f) keys[i] = kNever;
  }
  team.sync();
}

// A key and its expert as one integer: greater for the greater key, of equal ones for the first.
__device__ inline unsigned long long ranked(float key, int expert) {
  const unsigned bits = __float_as_uint(__fadd_rn(key, 0.0f));  // -0 is 0
  const unsigned ordered = bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
  return static_cast<unsigned long long>(ordered) << 32 | ~static_cast<unsigned>(expert);
}

// The best expert, which is then not there any more; -1 where all keys are -inf.
template <class Team, int N>
__device__ int take_best(const Team& team, float (&keys)[N]) {
  float most = kNever;
  int item = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    item = keys[i] > most ? i : item;
    most = fmaxf(most, keys[i]);
  }
  const unsigned long long best = team.fold(ranked(most, expert_of(team, item)), Greater());
  if (best >> 32 == ranked(kNever, 0) >> 32) return -1;
  const int expert = static_cast<int>(~static_cast<unsigned>(best));
#pragma unroll
  for (int i = 0; i < N; ++i) keys[i] = expert_of(team, i) == expert ? kNever : keys[i];
  return expert;
}

// Chance of each expert to be above the last choice when its own noise is drawn again.
template <class Team, int N, bool kNoise>
__device__ void make_chances(const Token<Team, N, kNoise>& token, int last, float threshold, float (&chances)[N]) {
  const float per_sigma = inverse_sigma(token.p);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // With fewer experts than choices each is chosen for certain.
    const float chance = last < 0 ? 1.0f : normal_cdf((token.z[i] - threshold) * per_sigma);
    chances[i] = token.z[i] == kNever ? 0.0f : chance;
  }
}

// Writes the choices of a token, counts them, and returns the last one and the logit that it was chosen by.
template <class Team, int N, bool kNoise>
__device__ void choose(const Token<Team, N, kNoise>& token, const Softmax& chosen, int64_t at, int label, float* memory,
                       int32_t* counts, const ScoresOut& out, int& last, float& threshold) {
  const Router& p = token.p;
  const Team& team = token.team;
  float keys[N];
  if (p.given == nullptr) {
    make_keys(token, chosen, keys);
    if (p.groups > 1) drop_groups(team, p, memory, keys);
  }
  const bool is_token = at < p.T;
  float total = 0.0f;
  for (int j = 0; j < p.k; ++j) {
    if (p.given == nullptr) {
      last = take_best(team, keys);
    } else {
      const int64_t expert = token.live ? p.given[at * p.k + j] : -1;
      last = expert < p.E ? static_cast<int>(expert) : -1;
    }
    threshold = token.chosen_by_of(last);
    const float gate = last < 0 ? 0.0f : p.sigmoid ? sigmoid_of(threshold) : chosen(threshold);
    total += gate;
    if (team.lane == j % team.size() && is_token) {
      out.experts[at * p.k + j] = last;
      out.gates[at * p.k + j] = gate;
      if (j == 0) out.priority[at] = gate;
      if (last >= 0 && label >= 0) atomicAdd(counts + int64_t{label} * p.E + last, 1);
    }
  }
  if (!p.renormalize || !is_token) return;
  for (int j = team.lane; j < p.k; j += team.size()) {  // those that this thread has written
    float& gate = out.gates[at * p.k + j];
    gate = total == 0.0f ? 0.0f : gate / total;
  }
}

// The difference of the two largest probabilities, without cancellation: the largest is exp(0) times `share`, and a
// sigmoid less another is sigmoid(a) sigmoid(-b) (1 - exp(b - a)). NaN comes out.
__device__ inline float margin_of(const Router& p, const Softmax& clean, const Softmax& of_logits) {
  const float a = of_logits.largest, b = of_logits.second;
  const float apart = a == b ? 0.0f : -expm1f(b - a);
  return clean.share * apart * (p.sigmoid ? sigmoid_of(-b) : 1.0f);
}

// ---- All tokens of a block ----------------------------------------------------------------------------------------

// Memory of a block: what its team exchanges, a table of each warp, counts, and what teams need for groups of experts.
struct BlockMemory {
  int64_t units, width, tables, counts, groups;  // in floats

  __host__ __device__ BlockMemory(const Router& p, int kinds, int64_t lanes, int64_t items, bool shared_tables)
      : units(lanes > kWarp ? 1 : kTeamThreads / kWarp),
        width(table_width(kinds, lanes, items)),
        tables(shared_tables ? units * p.segments * width : 0),
        counts(shared_tables ? int64_t{p.segments} * (p.E + 1) : 0),
        groups(p.groups > 1 ? (lanes > kWarp ? 1 : kTeamThreads / lanes) * (p.E + 2 * p.groups) : 0) {}
  __host__ __device__ size_t bytes() const {
    return (kExchange + static_cast<size_t>(tables + counts + groups)) * sizeof(float);
  }
  static constexpr size_t kExchange = 2 * kWarp;
};

// Tokens of a team after which its block adds its tables to what it writes: a table is in float32, and no sum in it may
// have millions of terms. More where there are many segments, as a table has all of them.
template <class Team>
__device__ inline int longest_table(int segments) {
  return (Team::kStages == 0 ? 128 : 32) * ceil_divide(segments, 4);
}

// Adds the tables of the block's warps to what the other kernel reads, and clears them.
__device__ inline void write_part(const Router& p, const BlockMemory& memory, int kinds, int lanes, int items,
                                  float* tables, double* sums) {
  const int64_t cells = int64_t{p.segments} * p.E, width = kinds * cells + 3 * p.segments;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
    int64_t segment, place;
    if (c < kinds * cells) {
      const int64_t cell = c % cells;
      segment = cell / p.E;
      place = c / cells * lanes * items + place_of_expert(lanes, static_cast<int>(cell % p.E));
    } else {
      segment = (c - kinds * cells) % p.segments;
      place = memory.width - 3 + (c - kinds * cells) / p.segments;
    }
    double sum = sums[c];
    for (int64_t unit = 0; unit < memory.units; ++unit) {
      float& own = tables[(unit * p.segments + segment) * memory.width + place];
      sum += static_cast<double>(own);
      own = 0.0f;
    }
    sums[c] = sum;
  }
}

template <class Team, int N, bool kNoise>
__global__ void __launch_bounds__(Team::kThreads, kBlocksAtOnce<N, kNoise>)
    scores_kernel(Router p, ScoresOut out, Parts parts, int lanes) {
  auto* shared = shared_memory<float>();
  const Team team(shared, lanes);
  const bool shared_tables = parts.tables == nullptr;
  const BlockMemory memory(p, parts.kinds, team.size(), N, shared_tables);
  const int64_t part = blockIdx.x, cells = int64_t{p.segments} * p.E, table_size = p.segments * memory.width;
  float* tables = shared_tables ? shared + BlockMemory::kExchange : parts.tables + part * memory.units * table_size;
  const int64_t width = parts.kinds * cells + 3 * p.segments;
  double* part_sums = parts.sums + part * width;
  int32_t* part_counts = parts.counts + part * (cells + p.segments);
  auto* counts = shared_tables ? reinterpret_cast<int32_t*>(tables + memory.tables) : part_counts;
  float* of_groups =
      shared + BlockMemory::kExchange + memory.tables + memory.counts + team.index * (p.E + 2 * p.groups);
  for (int64_t c = threadIdx.x; c < memory.units * table_size; c += blockDim.x) tables[c] = 0.0f;
  for (int64_t c = threadIdx.x; c < width; c += blockDim.x) part_sums[c] = 0.0;
  for (int64_t c = threadIdx.x; c < cells + p.segments; c += blockDim.x) counts[c] = 0;
  for (int64_t c = part * blockDim.x + threadIdx.x; c < out.state_size; c += int64_t{gridDim.x} * blockDim.x) {
    out.state[c] = 0;
  }
  __syncthreads();

  Sums<Team, N, kNoise ? 3 : 1> sums(team, tables + team.unit * table_size, memory.width, parts.kinds);
  const int64_t tiles = ceil_divide(p.T, team.count);
  const int64_t begin = part * tiles / parts.count, end = (part + 1) * tiles / parts.count;
  const auto write_sums = [&] {
    sums.flush();
    __syncthreads();
    write_part(p, memory, parts.kinds, team.size(), N, tables, part_sums);
    __syncthreads();
  };
  // Counted down, as the loop has no register to spare.
  int left = longest_table<Team>(p.segments);
  for (int64_t tile = begin; tile < end; ++tile) {
    if (left-- == 0) {
      write_sums();
      left = longest_table<Team>(p.segments) - 1;
    }
    const int64_t at = tile * team.count + team.index;
    const Token<Team, N, kNoise> token(team, p, at);
    const int label = token.live ? p.label(at) : -1;
    sums.begin(label >= 0, label);

    float q[N];
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = token.z[i];
    const Softmax clean = take_distribution(team, p, q);
    sums.template add<0>(q);
    Softmax of_logits = clean;
    if (p.sigmoid) {
#pragma unroll
      for (int i = 0; i < N; ++i) q[i] = token.z[i];
      of_logits = take_softmax(team, q);
    }
    const float lse = logsumexp_of(team, of_logits, token.z);
    sums.add_totals({lse * lse, clean.entropy(), margin_of(p, clean, of_logits)});
    if (team.lane == 0 && label >= 0) atomicAdd(counts + cells + label, 1);

    Softmax chosen = clean;
    if constexpr (kNoise) {
#pragma unroll
      for (int i = 0; i < N; ++i) q[i] = token.noisy[i];
      chosen = take_distribution(team, p, q);
      sums.template add<1>(q);
    }
    int last = -1;
    float threshold = 0.0f;
    choose(token, chosen, at, label, of_groups, counts, out, last, threshold);
    if constexpr (kNoise) {
      if (p.load) {
        make_chances(token, last, threshold, q);
        sums.template add<2>(q);
      }
    }
  }
  write_sums();
  if (counts == part_counts) return;
  for (int64_t c = threadIdx.x; c < cells + p.segments; c += blockDim.x) part_counts[c] = counts[c];
}

}  // namespace

void expert_routing_scores(Stream stream, Input logits, const float* noise, const float* bias, const bool* allowed,
                           const int64_t* given, const int64_t* segment, const bool* valid, int64_t* experts,
                           float* gates, float* priority, float* sums, float* totals, int64_t* choices, int64_t* tokens,
                           float* margin, int64_t* kept, float* values, float* total, int32_t* state, double* part_sums,
                           int32_t* part_counts, float* tables, Integers spec, Integers plan, Integers losses,
                           Doubles numbers, int64_t T, int64_t E, double sigma) {
  const Router p(logits, noise, bias, allowed, given, segment, valid, spec, T, E, sigma);
  const int64_t lanes = plan.data[0], items = plan.data[1];
  const Parts parts{part_sums, part_counts, tables, plan.data[2], static_cast<int>(plan.data[3])};
  const size_t bytes = BlockMemory(p, parts.kinds, lanes, items, tables == nullptr).bytes();
  const ScoresOut out{experts, gates, priority, state, plan.data[4]};
  with_team(lanes, items, [&](auto team) {
    with_noise(noise != nullptr, [&](auto is_noisy) {
      using Team = decltype(team);
      const auto kernel = scores_kernel<typename Team::Type, Team::kItems, decltype(is_noisy)::value>;
      launch(kernel, parts.count, threads_of(lanes), bytes, stream, p, out, parts, lanes);
    });
  });
  const Totals of_all{sums, totals, margin, choices, tokens, kept, values, total, state};
  launch_totals(stream, parts, of_all, LossTerms(losses, numbers, p.segments, E, noise != nullptr));
}

}  // namespace contrastive_ops
