// Part of bindings.cpp: the functions of maxsim.
#pragma once

#include <limits>

#include "bindings_similarity_problem.h"
#include "maxsim.h"

namespace contrastive_ops {
namespace {

// Sets of tokens with the tensors that their pointers point into. What addresses memory is checked once more.
struct TokenSetTensors {
  Tensor tokens, offsets, mask;
  TokenSets raw{};

  TokenSetTensors(const Tensor& tokens_in, const Tensor& offsets_in, const Tensor& mask_in) {
    CHECK_VALUE(tokens_in.dims == 2 && tokens_in.device == kOnCpu, "tokens must be a matrix on the CPU");
    CHECK_VALUE(offsets_in.dims == 1 && offsets_in.size(0) >= 1, "offsets must have shape (sets + 1,)");
    tokens = tokens_in.rows_contiguous();
    offsets = shaped(offsets_in, offsets_in.shape(), Type::int64, "offsets");
    mask = shaped(mask_in, {tokens.size(0)}, Type::boolean, "mask");
    raw = {tokens.data, tokens.size(0), tokens.stride(0), offsets.as<int64_t>(), offsets.size(0) - 1, mask.as<bool>()};
    for (int64_t s = 0; s <= raw.sets; ++s) {
      const int64_t before = s == 0 ? 0 : raw.offsets[s - 1];
      CHECK_VALUE(raw.offsets[s] >= before && raw.offsets[s] <= raw.T, "maxsim: offsets must ascend within [0, ", raw.T,
                  "], got ", raw.offsets[s], " at ", s);
      CHECK_VALUE(raw.offsets[s] - before <= std::numeric_limits<int32_t>::max(),
                  "maxsim: a set must have fewer than 2^31 tokens");
    }
  }
};

struct MaxSimTensors {
  TokenSetTensors queries, documents;
  Tensor pair_queries, pair_documents;
  MaxSimProblem raw{};

  MaxSimTensors(const Tensor& q, const Tensor& d, const Tensor& q_offsets, const Tensor& d_offsets,
                const Tensor& q_mask, const Tensor& d_mask, const Tensor& pair_q, const Tensor& pair_d,
                int64_t longest_query, int64_t k)
      : queries(q, q_offsets, q_mask), documents(d, d_offsets, d_mask) {
    CHECK_VALUE(q.size(1) == d.size(1), "queries and documents must have the same last dimension");
    CHECK_TYPE(q.type == d.type, "queries and documents must have the same dtype");
    CHECK_VALUE(pair_q.defined() == pair_d.defined() && k >= 1, "pairs must name both sides, and k >= 1");
    raw.dtype = dtype_of(q);
    raw.queries = queries.raw;
    raw.documents = documents.raw;
    raw.D = q.size(1);
    raw.k = k;
    if (!pair_q) return;
    raw.paired = true;  // the pointers of no pairs may be null
    raw.pairs = pair_q.dims == 1 ? pair_q.size(0) : 0;
    raw.longest_query = longest_query;
    pair_queries = shaped(pair_q, {raw.pairs}, Type::int64, "pair_queries");
    pair_documents = shaped(pair_d, {raw.pairs}, Type::int64, "pair_documents");
    raw.pair_queries = pair_queries.as<int64_t>();
    raw.pair_documents = pair_documents.as<int64_t>();
    for (int64_t e = 0; e < raw.pairs; ++e) {
      const int64_t i = raw.pair_queries[e], j = raw.pair_documents[e];
      CHECK_VALUE(i >= 0 && i < queries.raw.sets && j >= 0 && j < documents.raw.sets,
                  "maxsim: pairs must name queries in [0, ", queries.raw.sets, ") and documents in [0, ",
                  documents.raw.sets, "), got ", i, " and ", j);
      CHECK_VALUE(queries.raw.offsets[i + 1] - queries.raw.offsets[i] <= longest_query,
                  "maxsim: a query must not have more than ", longest_query, " tokens, the longest that was given");
    }
  }
  Type type() const { return accumulator(queries.tokens.type); }
  Shape score_shape() const {
    if (raw.paired) return {raw.pairs};
    return {raw.queries.sets, raw.documents.sets};
  }
  Shape winner_shape() const {
    if (raw.paired) return {raw.pairs, raw.longest_query, raw.k};
    return {raw.documents.sets, raw.queries.T, raw.k};
  }
};

std::tuple<Tensor, Tensor> maxsim_forward(const Tensor& queries, const Tensor& documents, const Tensor& query_offsets,
                                          const Tensor& document_offsets, const Optional& query_mask,
                                          const Optional& document_mask, const Optional& pair_queries,
                                          const Optional& pair_documents, int64_t longest_query, int64_t k, bool keep) {
  const MaxSimTensors p(queries, documents, query_offsets, document_offsets, query_mask, document_mask, pair_queries,
                        pair_documents, longest_query, k);
  Shape shape = p.winner_shape();
  if (!keep) shape.sizes[0] = 0;
  const Tensor scores = zeros(p.score_shape(), p.type()), winners = empty(shape, Type::int32);
  run(maxsim_cpu().forward, p.raw, MaxSimForward{scores.data, keep ? winners.as<int32_t>() : nullptr});
  return {scores, winners};
}

std::tuple<Tensor, Tensor> maxsim_backward(const Tensor& queries, const Tensor& documents, const Tensor& query_offsets,
                                           const Tensor& document_offsets, const Optional& pair_queries,
                                           const Optional& pair_documents, const Tensor& winners,
                                           const Tensor& d_scores, int64_t needs) {
  CHECK_VALUE(winners.dims == 3 && winners.type == Type::int32, "winners must come from forward");
  const MaxSimTensors p(queries, documents, query_offsets, document_offsets, Tensor(), Tensor(), pair_queries,
                        pair_documents, winners.size(1), winners.size(2));
  CHECK_VALUE(winners.has_shape(p.winner_shape()), "winners must come from forward");
  const Tensor won = shaped(winners, p.winner_shape(), Type::int32, "winners");
  const Tensor upstream = shaped(d_scores, p.score_shape(), p.type(), "d_scores");
  const bool has_queries = wants(needs, 0), has_documents = wants(needs, 1);
  const Tensor dqueries = empty({has_queries ? queries.size(0) : 0, queries.size(1)}, p.type());
  const Tensor ddocuments = empty({has_documents ? documents.size(0) : 0, documents.size(1)}, p.type());
  run(maxsim_cpu().backward, p.raw,
      MaxSimBackward{won.as<int32_t>(), upstream.data, has_queries ? dqueries.data : nullptr,
                     has_documents ? ddocuments.data : nullptr});
  return {dqueries, ddocuments};
}

}  // namespace
}  // namespace contrastive_ops
