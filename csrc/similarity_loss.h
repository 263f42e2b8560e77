// From matrices to a loss: the sweeps of similarity_reduce with the rows' algebra between them.
#pragma once

#include "row_losses.h"
#include "similarity_reduce.h"

namespace contrastive_ops {

// Every `void*` points to the accumulation type and is (N,) or null, if nothing else is said.
struct SimilarityLoss {
  RowLoss kind;
  Reduction reduction;
  const void* weight;         // of each row's loss; the mean divides by their sum, and a row of weight 0 is left out
  const void* extra;          // lse of logits that the sweep does not see, for RowLoss::softmax
  const void* target_weight;  // of the target's logit, which is added
  const void* count;          // how many positives a row has, for the kinds with several; a row of none is left out
  void* loss;                 // one number, or (N,) for Reduction::none
  // The derivatives of the result (of each row's result) by its terms; null where nobody wants them.
  void *d_extra, *d_weight, *d_target_weight;
  void* folds;    // the folds of all rows, one after another
  void* d_folds;  // like folds, and d_target: null unless backward follows
  void* d_target;
  SimilarityBackward gradients;  // only its outputs are read, and only if `in_one_pass`
};

// Whether the gradients can be formed in forward: what arrives at each row is known, and a row is complete when it is
// left.
bool in_one_pass(RowLoss kind, Reduction reduction, bool self);

// How many folds a kind has, and the folds themselves: of the first set and, for several positives, of a second one.
int folds_of(RowLoss kind, SimilarityFold folds[kRowFolds]);

// The targets of rows that are given none: column i of row i, and of two stacked views the other view of the sample.
void usual_target(bool self, int64_t rows, int64_t* target);

// A positive of each row and the number of them, from labels (-1: none): the next row of the same label or, with labels
// of columns, the first column. Where there is none the target is any column.
void positives_of(const int64_t* labels, int64_t rows, const int64_t* col_labels, int64_t cols, int64_t* target,
                  int64_t* count);

// `one_pass`: form the gradients too, 6 N M D. Else `d_folds` and `d_target` are what backward of `table` takes, after
// they are multiplied by what arrives at the result. The target of `p` must be there.
void similarity_loss_cpu(const SimilarityProblem& p, const SimilarityLoss& loss, bool one_pass,
                         const SimilarityReduce& table, const Parallel& parallel);

}  // namespace contrastive_ops
