// Derivative of the scores of a router on a GPU: one read of the logits, one write of their gradient.
//
// Bound by memory: 2 or 4 bytes per logit that are read, and as many that are written. The scores are computed again.
// Where losses are told, each block forms their slopes, a few numbers of each expert, before its first token.
#include "expert_routing.h"

#include "expert_routing_losses.h"
#include "expert_routing_token.h"

namespace contrastive_ops {
namespace {

struct Gradients {
  const int64_t* experts;  // (T, k) as chosen
  const float* d_gates;    // (T, k), or null
  const float* d_sums;     // (3, segments, E) of the sums of p, of p with noise, and of the chances
  const float* d_totals;   // (2, segments) of the squared lse and the entropy
  Output d_logits;         // (T, E)
  int kinds;               // of sums of which d_sums has room where the block forms it
  bool wide_sums, wide_logits;
};

// One token and its gradient, on the way through everything that its logits are part of.
template <class Team, int N, bool kNoise>
struct Derivative {
  const Router& p;
  const Gradients& g;
  const Team& team;
  const Token<Team, N, kNoise> token;
  const int64_t at;
  const int label;
  float dz[N];

  __device__ Derivative(const Router& p, const Gradients& g, const Team& team, int64_t at)
      : p(p), g(g), team(team), token(team, p, at), at(at), label(token.live ? p.label(at) : -1) {}

  // The derivatives by the sums of a kind that the token is part of.
  __device__ void load_upstream(int kind, float (&to)[N]) const {
    const float* row = g.d_sums + (kind * int64_t{p.segments} + max(label, 0)) * p.E;
    load_row(team, row, p.E, label >= 0, g.wide_sums, 0.0f, to);
  }
  __device__ int choice(int j) const { return token.live ? static_cast<int>(g.experts[at * p.k + j]) : -1; }
  __device__ float gate_of(int expert, const Softmax& chosen) const {
    const float logit = token.chosen_by_of(expert);
    return expert < 0 ? 0.0f : p.sigmoid ? sigmoid_of(logit) : chosen(logit);
  }

  // Adds the derivatives by the gates, before they are scaled to sum to 1.
  __device__ void add_d_gates(const Softmax& chosen, float (&to)[N]) const {
    if (g.d_gates == nullptr) return;
    float total = 1.0f, mean = 0.0f;
    if (p.renormalize) {
      total = 0.0f;
      for (int j = 0; j < p.k; ++j) {
        const int expert = choice(j);
        const float gate = gate_of(expert, chosen);
        if (expert < 0) continue;
        total += gate;
        mean += gate * g.d_gates[at * p.k + j];
      }
      mean /= total;
    }
    if (total == 0.0f) return;
    for (int j = 0; j < p.k; ++j) {
      const int expert = choice(j);
      if (expert < 0) continue;
      const float d = (g.d_gates[at * p.k + j] - mean) / total;
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] += expert_of(team, i) == expert ? d : 0.0f;
    }
  }

  // d becomes what goes through a softmax p; both are of all experts.
  __device__ void through_softmax(const float (&prob)[N], float (&d)[N]) const {
    float mean = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) mean += prob[i] * d[i];
    mean = team.fold(mean, Plus());
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = prob[i] * (d[i] - mean);
  }

  // Through the probabilities without noise: sums, entropy, lse; and the gates, if they are among these.
  __device__ Softmax through_clean() {
    float prob[N], d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) prob[i] = token.z[i];
    const Softmax clean = take_distribution(team, p, prob);
    const float d_lse_squared = label < 0 ? 0.0f : g.d_totals[label];
    const float d_entropy = label < 0 ? 0.0f : g.d_totals[p.segments + label];
    load_upstream(0, d);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float z = token.z[i];
      const float log_p = (p.sigmoid ? log_sigmoid_of(z) : z) - clean.largest - clean.log_total;
      d[i] -= z == kNever ? 0.0f : d_entropy * log_p;
    }
    if (!kNoise && !p.sigmoid) add_d_gates(clean, d);
    through_softmax(prob, d);
    Softmax of_logits = clean;
    if (p.sigmoid) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        d[i] *= sigmoid_of(-token.z[i]);
        prob[i] = token.z[i];
      }
      of_logits = take_softmax(team, prob);
    }
    const float factor = 2.0f * d_lse_squared * logsumexp_of(team, of_logits, token.z);
#pragma unroll
    for (int i = 0; i < N; ++i) dz[i] = d[i] + factor * prob[i];
    return clean;
  }

  // Through the probabilities with noise; and the gates, if they are among these.
  __device__ void through_noisy() {
    float prob[N], d[N];
#pragma unroll
    for (int i = 0; i < N; ++i) prob[i] = token.chosen_by(i);
    const Softmax noisy = take_distribution(team, p, prob);
    load_upstream(1, d);
    if (!p.sigmoid) add_d_gates(noisy, d);
    through_softmax(prob, d);
#pragma unroll
    for (int i = 0; i < N; ++i) dz[i] += p.sigmoid ? d[i] * sigmoid_of(-token.chosen_by(i)) : d[i];
  }

  // Through gates that are sigmoids.
  __device__ void through_sigmoids(const Softmax& unused) {
    float d[N] = {};
    add_d_gates(unused, d);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gate = sigmoid_of(token.chosen_by(i));
      dz[i] += d[i] * gate * (1.0f - gate);
    }
  }

  // Through the chances to be chosen.
  __device__ void through_chances() {
    constexpr float kInverseSqrt2Pi = 0.3989422804014327f;
    const int last = choice(p.k - 1);
    const float threshold = token.chosen_by_of(last), per_sigma = inverse_sigma(p);
    float d[N], sum = 0.0f;
    load_upstream(2, d);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float u = (token.z[i] - threshold) * per_sigma;
      const bool none = last < 0 || token.z[i] == kNever;
      d[i] = none ? 0.0f : d[i] * (__expf(-0.5f * u * u) * kInverseSqrt2Pi * per_sigma);
      sum += d[i];
    }
    sum = team.fold(sum, Plus());
    // The threshold is a logit itself: that of the last choice.
#pragma unroll
    for (int i = 0; i < N; ++i) dz[i] += expert_of(team, i) == last ? d[i] - sum : d[i];
  }

  __device__ void write() {
    if (at >= p.T) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (token.z[i] == kNever) dz[i] = 0.0f;
    }
    if (g.d_logits.dtype == DType::float32) {
      store_as<float>();
    } else if (g.d_logits.dtype == DType::bfloat16) {
      store_as<BFloat16>();
    } else {
      store_as<Float16>();
    }
  }
  template <class T>
  __device__ void store_as() const {
#pragma unroll
    for (int first = 0; first < N; first += kRun) {
      const int expert = expert_of(team, first);
      store_run(dz + first, p.E - expert, g.wide_logits, static_cast<T*>(g.d_logits.data) + at * p.E + expert);
    }
  }
};

template <class Team, int N, bool kNoise>
__global__ void __launch_bounds__(Team::kThreads, kBlocksAtOnce<N, kNoise>)
    scores_backward_kernel(const __grid_constant__ Router p, Gradients g, const __grid_constant__ LossSums sums,
                           const __grid_constant__ LossGradients upstream, const __grid_constant__ LossTerms losses,
                           int lanes) {
  const Team team(shared_memory<float>(), lanes);
  if (g.d_sums == nullptr) {
    float *d_totals = shared_memory<float>() + 2 * kWarp, *d_sums = d_totals + ceil_divide(2 * p.segments, 4) * 4;
    write_slopes(losses, sums, upstream, g.kinds, d_sums, d_totals);
    g.d_sums = d_sums;
    g.d_totals = d_totals;
  }
  const int64_t tiles = ceil_divide(p.T, team.count);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Derivative<Team, N, kNoise> derivative(p, g, team, tile * team.count + team.index);
    const Softmax clean = derivative.through_clean();
    if (kNoise) derivative.through_noisy();
    if (p.sigmoid) derivative.through_sigmoids(clean);
    if (p.load) derivative.through_chances();
    derivative.write();
  }
}

// Blocks that form slopes: as many as a GPU has at once, or a few more.
constexpr int64_t kMostSlopes = 1024;

}  // namespace

void expert_routing_scores_backward(Stream stream, Input logits, const float* noise, const bool* allowed,
                                    const int64_t* segment, const bool* valid, const int64_t* experts,
                                    const float* d_gates, const float* d_sums, const float* d_totals, const float* sums,
                                    const float* totals, const int64_t* choices, const int64_t* tokens,
                                    const float* d_values, const float* d_total, Output d_logits, Integers spec,
                                    Integers plan, Integers losses, Doubles numbers, int64_t T, int64_t E,
                                    double sigma) {
  const Router p(logits, noise, nullptr, allowed, nullptr, segment, valid, spec, T, E, sigma);
  const int64_t lanes = plan.data[0], items = plan.data[1], tiles = ceil_divide(T, tokens_at_once(lanes));
  const bool forms = d_sums == nullptr;
  const int kinds = forms ? 1 + (noise != nullptr) + p.load : 0;
  const Gradients g{experts,
                    d_gates,
                    d_sums,
                    d_totals,
                    d_logits,
                    kinds,
                    is_aligned16(d_sums) && E % 4 == 0,
                    is_aligned16(d_logits.data) && E % (d_logits.dtype == DType::float32 ? 4 : 8) == 0};
  const int64_t slopes = forms ? kinds * p.segments * E + ceil_divide(2 * p.segments, 4) * 4 : 0;
  const size_t bytes = static_cast<size_t>(2 * kWarp + slopes) * sizeof(float);
  with_team(lanes, items, [&](auto team) {
    with_noise(noise != nullptr, [&](auto is_noisy) {
      using Team = decltype(team);
      const auto kernel = scores_backward_kernel<typename Team::Type, Team::kItems, decltype(is_noisy)::value>;
      launch(kernel, forms ? min(tiles, kMostSlopes) : tiles, threads_of(lanes), bytes, stream, p, g,
             LossSums{sums, totals, choices, tokens}, LossGradients{d_values, d_total},
             LossTerms(losses, numbers, p.segments, E, noise != nullptr), lanes);
    });
  });
}

}  // namespace contrastive_ops
