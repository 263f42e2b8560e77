// Kernels of plain calls (Path::plain), which most losses are; the others are those of any call.
#pragma once

#include "similarity_sums.h"

namespace contrastive_ops {

// Folds a chunk of a plain call into parts; false if there is no such kernel for the kind.
bool fold_plain(Stream stream, const PairArguments& p, int set, FoldKind kind, bool along_rows, bool along_cols,
                const PairChunk& chunk, Part* row_parts, Part* col_parts);

// Weights and sums of a chunk of a plain call.
void weigh_plain(Stream stream, const PairArguments& p, const Upstreams& up, const PlainFolds& folds,
                 const PairChunk& chunk, const Slots& slots, const float* norm, const Output& weights, float* parts);

}  // namespace contrastive_ops
