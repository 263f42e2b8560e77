// Part of bindings.cpp: from the arguments of an operator to a SimilarityProblem, and where its gradients go.
#pragma once

#include <vector>

#include "door.h"
#include "similarity_decode.h"
#include "similarity_reduce.h"
#include "threads.h"

namespace contrastive_ops {
namespace {

// Runs a function of a primitive; other threads of Python go on meanwhile.
template <class Function, class... Arguments>
void run_on(const Parallel& threads, Function function, const Arguments&... arguments) {
  const WithoutGil without_gil;
  function(arguments..., threads);
}
template <class Function, class... Arguments>
void run(Function function, const Arguments&... arguments) {
  run_on(parallel(), function, arguments...);
}

bool wants(int64_t needs, int bit) { return (needs >> bit & 1) != 0; }

// A DecodedProblem with the tensors that it points into.
struct Problem : DecodedProblem {
  Tensor x, y, scale, row_bias, col_bias, target;

  Problem(const Tensor& x_in, const Tensor& y_in, const Tensor& scale_in, const Tensor& row_bias_in,
          const Tensor& col_bias_in, const Tensor& target_in, const TensorList& pair_data, const Integers& spec) {
    const Tensor& y_or_x = y_in ? y_in : x_in;
    CHECK_VALUE(x_in.dims == 2 && y_or_x.dims == 2, "x and y must be matrices");
    CHECK_VALUE(x_in.size(1) == y_or_x.size(1), "x and y must have the same last dimension");
    const bool codes = y_or_x.type == Type::int8 && x_in.type == Type::bfloat16;
    CHECK_TYPE(codes || x_in.type == y_or_x.type, "x and y must have the same dtype");
    CHECK_VALUE(x_in.device == kOnCpu && y_or_x.device == kOnCpu, "x and y must be on the CPU");
    for (const Array& array : pair_data.arrays) check_on_cpu(array, "pair_data");
    x = x_in.rows_contiguous();
    y = y_in ? y_in.rows_contiguous() : x;
    raw.dtype = dtype_of(x);
    raw.x = x.data;
    raw.y = y.data;
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    raw.self = !y_in;
    row_bias = shaped(row_bias_in, {raw.N}, type(), "row_bias");
    col_bias = shaped(col_bias_in, {raw.M}, type(), "col_bias");
    target = shaped(target_in, {raw.N}, Type::int64, "target");
    raw.row_bias = row_bias.data;
    raw.col_bias = col_bias.data;
    raw.target = target.as<int64_t>();
    decode(pair_data.list(), spec, true);
    scale = shaped(scale_in, {total_scale_size()}, type(), "scale");
    set_scales(scale.data);
    CHECK_TYPE(codes == (raw.code_scale != nullptr), "int8 codes must come with their scale");
  }

  // Each fold's part of one vector; `maxima`: of maxima alone, null for other kinds.
  template <class T>
  std::vector<T*> parts(const Array& whole, bool maxima = false) const {
    std::vector<T*> result;
    char* at = whole.as<char>();
    for (const SimilarityFold& fold : folds) {
      const bool has = at != nullptr && (!maxima || fold.kind == FoldKind::max);
      result.push_back(has ? reinterpret_cast<T*>(at) : nullptr);
      if (has) at += size_of(fold) * bytes_of(whole.type);
    }
    return result;
  }

  // `part` of `parts` equal ones of what forward kept.
  void keep(const Tensor& kept, int part = 0, int parts = 1) {
    if (kept.numel() == 0) return;
    CHECK_VALUE(kept.is_contiguous() && kept.type == type() && kept.device == kOnCpu, "kept must come from forward");
    raw.kept_size = kept.numel() / parts;
    raw.kept = kept.as<char>() + part * raw.kept_size * bytes_of(kept.type);
  }
};

// What the kernels sum over pairs: their first pairs write it.
Tensor sums_over_pairs(const Problem& p, const Shape& shape) {
  return p.raw.N > 0 && p.raw.M > 0 ? empty(shape, p.type()) : zeros(shape, p.type());
}

struct Gradients {
  Tensor dx, dy, dscale, drow_bias, dcol_bias;
  std::vector<void*> dscale_parts;
  SimilarityBackward raw{};

  // `needs`: which of x, y, scale, row_bias, col_bias need a gradient, one bit each.
  Gradients(const Problem& p, int64_t needs) {
    const int64_t N = p.raw.N, M = p.raw.M, D = p.raw.D;
    const bool has_dy = wants(needs, 1) && !p.raw.self;
    dx = sums_over_pairs(p, {wants(needs, 0) ? N : 0, D});
    dy = sums_over_pairs(p, {has_dy ? M : 0, D});
    dscale = empty({wants(needs, 2) ? p.scale.numel() : 0}, p.type());
    drow_bias = empty({wants(needs, 3) ? N : 0}, p.type());
    dcol_bias = empty({wants(needs, 4) ? M : 0}, p.type());
    if (wants(needs, 0)) raw.dx = dx.data;
    if (has_dy) raw.dy = dy.data;
    if (wants(needs, 3)) raw.drow_bias = drow_bias.data;
    if (wants(needs, 4)) raw.dcol_bias = dcol_bias.data;
    if (!wants(needs, 2)) return;
    char* at = dscale.as<char>();
    for (const SimilaritySet& set : p.sets) {
      dscale_parts.push_back(at);
      at += p.scale_size(set) * bytes_of(p.type());
    }
    raw.dscale = dscale_parts.data();
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all() const { return {dx, dy, dscale, drow_bias, dcol_bias}; }
};

}  // namespace
}  // namespace contrastive_ops
