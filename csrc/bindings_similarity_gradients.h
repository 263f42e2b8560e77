// Part of bindings.cpp, which includes it with its other headers: where the gradients of a SimilarityProblem go.
#pragma once

#include <vector>

#include "bindings_similarity_problem.h"
#include "similarity_reduce.h"

namespace contrastive_ops {
namespace {

struct Gradients {
  Tensor dx, dy, dscale, drow_bias, dcol_bias;
  std::vector<void*> dscale_parts;
  SimilarityBackward raw{};

  // `needs`: which of x, y, scale, row_bias, col_bias need a gradient, one bit each.
  Gradients(const Problem& p, int64_t needs) {
    const auto wants = [&](int bit) { return (needs >> bit & 1) != 0; };
    dx = p.sums({wants(0) ? p.raw.N : 0, p.raw.D});
    dy = p.sums({wants(1) && !p.raw.self ? p.raw.M : 0, p.raw.D});
    dscale = p.empty(wants(2) ? p.scale.numel() : 0);
    drow_bias = p.empty(wants(3) ? p.raw.N : 0);
    dcol_bias = p.empty(wants(4) ? p.raw.M : 0);
    if (wants(0)) raw.dx = dx.data_ptr();
    if (wants(1) && !p.raw.self) raw.dy = dy.data_ptr();
    if (wants(2)) {
      char* at = static_cast<char*>(dscale.data_ptr());
      for (const auto& set : p.sets) {
        dscale_parts.push_back(at);
        at += p.scale_size(set) * dscale.element_size();
      }
      raw.dscale = dscale_parts.data();
    }
    if (wants(3)) raw.drow_bias = drow_bias.data_ptr();
    if (wants(4)) raw.dcol_bias = dcol_bias.data_ptr();
  }
};

}  // namespace
}  // namespace contrastive_ops
