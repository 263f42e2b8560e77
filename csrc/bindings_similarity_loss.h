// Part of bindings.cpp: similarity_loss.
#pragma once

#include <memory>

#include "bindings_similarity_problem.h"
#include "similarity_loss.h"

namespace contrastive_ops {
namespace {

// Of a tensor of no rows too, which may have no address but is there.
const void* given(const Tensor& t) {
  static const char nothing = 0;
  return t && t.data == nullptr ? &nothing : t.data;
}

// Checks that the folds of a problem are those of the kind.
void check_kind(const Problem& p, int64_t kind) {
  CHECK_VALUE(kind >= 0 && kind <= static_cast<int64_t>(RowLoss::log_mean), "kind must be one of RowLoss");
  SimilarityFold folds[kRowFolds];
  const int count = folds_of(static_cast<RowLoss>(kind), folds);
  bool same = static_cast<size_t>(count) == p.folds.size();
  for (int f = 0; same && f < count; ++f) {
    same = folds[f].set == p.folds[f].set && folds[f].kind == p.folds[f].kind && folds[f].cols == p.folds[f].cols;
    CHECK_VALUE(!folds[f].cols || p.raw.N == p.raw.M, "a loss of both sides needs as many columns as rows");
  }
  CHECK_VALUE(same, "folds must be those of the kind");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_loss_forward(
    const Tensor& x, const Optional& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Optional& target, const TensorList& pair_data, const Integers& spec, const Optional& weight,
    const Optional& extra, const Optional& target_weight, const Optional& count, int64_t kind, int64_t reduction,
    int64_t needs, int64_t kept_size) {
  Problem p(x, y, scale, row_bias, col_bias, target, pair_data, spec);
  check_kind(p, kind);
  CHECK_VALUE(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::none),
              "reduction must be one of Reduction");
  const int64_t N = p.raw.N;
  const Tensor w = shaped(weight, {N}, p.type(), "weight"), e = shaped(extra, {N}, p.type(), "extra");
  const Tensor tw = shaped(target_weight, {N}, p.type(), "target_weight"), c = shaped(count, {N}, p.type(), "count");
  SimilarityLoss loss{};
  loss.kind = static_cast<RowLoss>(kind);
  loss.reduction = static_cast<Reduction>(reduction);
  loss.weight = given(w);
  loss.extra = given(e);
  loss.target_weight = given(tw);
  loss.count = given(c);
  std::unique_ptr<int64_t[]> usual;
  if (!target) {
    usual.reset(new int64_t[N]);
    usual_target(p.raw.self, N, usual.get());
    p.raw.target = usual.get();
  }
  const bool one_pass = (needs & 31) != 0 && in_one_pass(loss.kind, loss.reduction, p.raw.self);
  const bool slopes_wanted = needs != 0 && !one_pass;
  const int64_t of_folds = N * static_cast<int64_t>(p.folds.size());
  const int64_t terms = (w ? 1 : 0) + (e ? 1 : 0) + (tw ? 1 : 0);
  const Tensor result = loss.reduction == Reduction::none ? empty({N}, p.type()) : empty({}, p.type());
  const Tensor folds = empty({one_pass ? 0 : of_folds}, p.type());
  const Tensor kept = empty({slopes_wanted ? kept_size : 0}, p.type());
  const Tensor slopes = empty({(needs == 0 ? 0 : terms * N) + (slopes_wanted ? of_folds + N : 0)}, p.type());
  char* at = slopes.as<char>();
  const auto next = [&](bool wanted, int64_t size) -> void* {
    void* here = at;
    if (wanted) at += size * bytes_of(p.type());
    return wanted ? here : nullptr;
  };
  loss.loss = result.data;
  loss.folds = folds.data;
  loss.d_extra = next(needs != 0 && e, N);
  loss.d_weight = next(needs != 0 && w, N);
  loss.d_target_weight = next(needs != 0 && tw, N);
  loss.d_folds = next(slopes_wanted, of_folds);
  loss.d_target = next(slopes_wanted, N);
  p.keep(kept);
  Gradients gradients(p, one_pass ? needs & 31 : 0);
  loss.gradients = gradients.raw;
  {
    const WithoutGil without_gil;
    similarity_loss_cpu(p.raw, loss, one_pass, similarity_reduce_cpu(), parallel());
  }
  return std::tuple_cat(std::tuple(result, needs == 0 ? empty({0}, p.type()) : folds, slopes, kept), gradients.all());
}

// gradient * factor, in tasks.
template <class A>
void multiply_in_tasks(const A* from, A factor, int64_t count, A* to) {
  constexpr int64_t kPart = int64_t{1} << 16;
  struct Product {
    const A* from;
    A factor, *to;
    int64_t count;
  } product{from, factor, to, count};
  const auto multiply = [](void* context, int64_t part, int) {
    const Product& all = *static_cast<Product*>(context);
    const int64_t end = part * kPart + kPart < all.count ? part * kPart + kPart : all.count;
    for (int64_t k = part * kPart; k < end; ++k) all.to[k] = all.from[k] * all.factor;
  };
  parallel().run((count + kPart - 1) / kPart, multiply, &product);
}

Tensor similarity_loss_scale(const Tensor& gradient, double factor) {
  const bool wide = gradient.type == Type::float64;
  CHECK_TYPE(wide || gradient.type == Type::float32, "gradient must be float32 or float64, got ", gradient.type);
  check_on_cpu(gradient, "gradient");
  const Tensor from = gradient.contiguous(), out = empty(gradient.shape(), gradient.type);
  const WithoutGil without_gil;
  wide ? multiply_in_tasks(from.as<double>(), factor, from.numel(), out.as<double>())
       : multiply_in_tasks(from.as<float>(), static_cast<float>(factor), from.numel(), out.as<float>());
  return out;
}

}  // namespace
}  // namespace contrastive_ops
