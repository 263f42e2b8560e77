// Compares a student's similarity matrix with a teacher's, neither of which is stored; shared by cpu/ and cuda/.
//
// A line is a row or a column of both matrices. Its value is the divergence of the student's softmax from the teacher's
// over the pairs that take part, or a sum over these pairs.
#pragma once

#include "similarity_reduce.h"

namespace contrastive_ops {

// p the teacher's probabilities, q the student's. The last two are of logits that are squared distances: the Huber loss
// between the student's and the teacher's distance, and the student's distance itself.
enum class DistillKind : int { kl = 0, reverse_kl = 1, ce = 2, js = 3, huber = 4, distance = 5 };

struct DistillProblem {
  SimilarityProblem student, teacher;  // of the same N and M, one set each; rules are the student's
  DistillKind kind;
  double delta;     // where the Huber loss becomes linear
  bool rows, cols;  // which lines: rows, then columns
};

// Lines have 5 statistics, (5, lines): the logsumexp of the student's logits as their maximum and the logarithm of the
// sum of exp(logit - maximum), -inf and 0 where no pair takes part; the same of the teacher's; and what is taken from
// log(q / p), or from log(q / m) / 2 with m = (p + q) / 2, in the derivative of "reverse_kl" or "js".
struct DistillForward {
  void* values;
  void* statistics;  // null where lines are sums over pairs
};

struct DistillBackward {
  const void *statistics, *d_values;
  SimilarityBackward gradients;  // only its outputs are read
};

struct SimilarityDistill {
  void (*forward)(const DistillProblem&, const DistillForward&, const Parallel&);
  void (*backward)(const DistillProblem&, const DistillBackward&, const Parallel&);
};

CONTRASTIVE_OPS_PRIMITIVE(SimilarityDistill, similarity_distill)

}  // namespace contrastive_ops
