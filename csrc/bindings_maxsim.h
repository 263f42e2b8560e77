// Part of bindings.cpp, the only file that includes it: the functions of maxsim.
#pragma once

#include <limits>
#include <tuple>

#include "bindings_similarity_problem.h"
#include "maxsim.h"

namespace contrastive_ops {
namespace {

// Sets of tokens with the tensors that their pointers point into. What addresses memory is checked once more.
struct TokenSetTensors {
  Tensor tokens, offsets, mask;
  TokenSets raw{};

  TokenSetTensors(const Tensor& tokens_in, const Tensor& offsets_in, const OptionalTensor& mask_in) {
    TORCH_CHECK_VALUE(tokens_in.dim() == 2 && tokens_in.device().is_cpu(), "tokens must be a matrix on the CPU");
    TORCH_CHECK_VALUE(offsets_in.dim() == 1 && offsets_in.size(0) >= 1, "offsets must have shape (sets + 1,)");
    tokens = rows_contiguous(tokens_in);
    offsets = vector_of(offsets_in, offsets_in.size(0), at::kLong, "offsets");
    mask = vector_of(mask_in, tokens.size(0), at::kBool, "mask");
    raw.tokens = tokens.data_ptr();
    raw.T = tokens.size(0);
    raw.stride = tokens.stride(0);
    raw.offsets = offsets.const_data_ptr<int64_t>();
    raw.sets = offsets.size(0) - 1;
    raw.mask = static_cast<const bool*>(data_or_null(mask));
    for (int64_t s = 0; s <= raw.sets; ++s) {
      const int64_t before = s == 0 ? 0 : raw.offsets[s - 1];
      TORCH_CHECK_VALUE(raw.offsets[s] >= before && raw.offsets[s] <= raw.T, "maxsim: offsets must ascend within [0, ",
                        raw.T, "], got ", raw.offsets[s], " at ", s);
      TORCH_CHECK_VALUE(raw.offsets[s] - before <= std::numeric_limits<int32_t>::max(),
                        "maxsim: a set must have fewer than 2^31 tokens");
    }
  }
};

struct MaxSimTensors {
  TokenSetTensors queries, documents;
  Tensor pair_queries, pair_documents;
  MaxSimProblem raw{};

  MaxSimTensors(const Tensor& q, const Tensor& d, const Tensor& q_offsets, const Tensor& d_offsets,
                const OptionalTensor& q_mask, const OptionalTensor& d_mask, const OptionalTensor& pair_q,
                const OptionalTensor& pair_d, int64_t longest_query, int64_t k)
      : queries(q, q_offsets, q_mask), documents(d, d_offsets, d_mask) {
    TORCH_CHECK_VALUE(q.size(1) == d.size(1), "queries and documents must have the same last dimension");
    TORCH_CHECK_TYPE(q.scalar_type() == d.scalar_type(), "queries and documents must have the same dtype");
    TORCH_CHECK_VALUE(pair_q.has_value() == pair_d.has_value() && k >= 1, "pairs must name both sides, and k >= 1");
    raw.dtype = dtype_of(q);
    raw.queries = queries.raw;
    raw.documents = documents.raw;
    raw.D = q.size(1);
    raw.k = k;
    if (!pair_q) return;
    raw.paired = true;  // the pointers of no pairs may be null
    raw.pairs = pair_q->size(0);
    raw.longest_query = longest_query;
    pair_queries = vector_of(pair_q, raw.pairs, at::kLong, "pair_queries");
    pair_documents = vector_of(pair_d, raw.pairs, at::kLong, "pair_documents");
    raw.pair_queries = pair_queries.const_data_ptr<int64_t>();
    raw.pair_documents = pair_documents.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < raw.pairs; ++e) {
      const int64_t i = raw.pair_queries[e], j = raw.pair_documents[e];
      TORCH_CHECK_VALUE(i >= 0 && i < queries.raw.sets && j >= 0 && j < documents.raw.sets,
                        "maxsim: pairs must name queries in [0, ", queries.raw.sets, ") and documents in [0, ",
                        documents.raw.sets, "), got ", i, " and ", j);
      TORCH_CHECK_VALUE(queries.raw.offsets[i + 1] - queries.raw.offsets[i] <= longest_query,
                        "maxsim: a query must not have more than ", longest_query,
                        " tokens, the longest that was given");
    }
  }
  at::ScalarType type() const { return accumulator(queries.tokens); }
  std::vector<int64_t> score_shape() const {
    if (raw.paired) return {raw.pairs};
    return {raw.queries.sets, raw.documents.sets};
  }
  std::vector<int64_t> winner_shape() const {
    if (raw.paired) return {raw.pairs, raw.longest_query, raw.k};
    return {raw.documents.sets, raw.queries.T, raw.k};
  }
};

std::tuple<Tensor, Tensor> maxsim_forward(const Tensor& queries, const Tensor& documents, const Tensor& query_offsets,
                                          const Tensor& document_offsets, const OptionalTensor& query_mask,
                                          const OptionalTensor& document_mask, const OptionalTensor& pair_queries,
                                          const OptionalTensor& pair_documents, int64_t longest_query, int64_t k,
                                          bool keep) {
  const MaxSimTensors p(queries, documents, query_offsets, document_offsets, query_mask, document_mask, pair_queries,
                        pair_documents, longest_query, k);
  Tensor scores = at::zeros(p.score_shape(), queries.options().dtype(p.type()));
  std::vector<int64_t> shape = p.winner_shape();
  if (!keep) shape[0] = 0;
  Tensor winners = at::full(shape, -1, queries.options().dtype(at::kInt));
  const MaxSimForward out{scores.data_ptr(), keep ? winners.data_ptr<int32_t>() : nullptr};
  {
    pybind11::gil_scoped_release release;
    maxsim_cpu().forward(p.raw, out, parallel());
  }
  return {scores, winners};
}

std::tuple<Tensor, Tensor> maxsim_backward(const Tensor& queries, const Tensor& documents, const Tensor& query_offsets,
                                           const Tensor& document_offsets, const OptionalTensor& pair_queries,
                                           const OptionalTensor& pair_documents, const Tensor& winners,
                                           const Tensor& d_scores, int64_t needs) {
  TORCH_CHECK_VALUE(winners.dim() == 3 && winners.scalar_type() == at::kInt, "winners must come from forward");
  const MaxSimTensors p(queries, documents, query_offsets, document_offsets, std::nullopt, std::nullopt, pair_queries,
                        pair_documents, winners.size(1), winners.size(2));
  TORCH_CHECK_VALUE(winners.sizes().vec() == p.winner_shape(), "winners must come from forward");
  TORCH_CHECK_VALUE(d_scores.sizes().vec() == p.score_shape() && d_scores.scalar_type() == p.type(),
                    "d_scores must be like the scores");
  const Tensor won = winners.contiguous(), upstream = d_scores.contiguous();
  const auto wants = [&](int bit) { return (needs >> bit & 1) != 0; };
  const auto options = queries.options().dtype(p.type());
  Tensor dqueries = at::zeros({wants(0) ? queries.size(0) : 0, queries.size(1)}, options);
  Tensor ddocuments = at::zeros({wants(1) ? documents.size(0) : 0, documents.size(1)}, options);
  const MaxSimBackward raw{won.const_data_ptr<int32_t>(), upstream.data_ptr(), wants(0) ? dqueries.data_ptr() : nullptr,
                           wants(1) ? ddocuments.data_ptr() : nullptr};
  {
    pybind11::gil_scoped_release release;
    maxsim_cpu().backward(p.raw, raw, parallel());
  }
  return {dqueries, ddocuments};
}

}  // namespace
}  // namespace contrastive_ops
