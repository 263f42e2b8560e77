// Part of bindings.cpp: the functions of similarity_distill.
#pragma once

#include <limits>

#include "bindings_similarity_problem.h"
#include "similarity_distill.h"

namespace contrastive_ops {
namespace {

DistillKind distill_kind_of(const std::string& name) {
  const char* names[] = {"kl", "reverse_kl", "ce", "js", "huber", "distance"};
  for (int kind = 0; kind < 6; ++kind) {
    if (name == names[kind]) return static_cast<DistillKind>(kind);
  }
  throw std::invalid_argument("similarity_distill: kind must be one of the known ones, got " + name);
}

// Both problems with the tensors that their pointers point into.
struct DistillProblems {
  Problem student, teacher;
  DistillProblem raw{};

  DistillProblems(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& row_bias, const Tensor& col_bias,
                  const Tensor& teacher_x, const Tensor& teacher_y, const Tensor& teacher_scale,
                  const Tensor& teacher_row_bias, const Tensor& teacher_col_bias, const TensorList& pair_data,
                  const Integers& spec, const std::string& kind, double delta, int64_t dims, const Tensor& kept)
      : student(x, y, scale, row_bias, col_bias, Tensor(), pair_data, spec),
        teacher(plain_problem(teacher_x, teacher_y, teacher_scale, teacher_row_bias, teacher_col_bias)) {
    CHECK_TYPE(teacher_x.type == x.type, "student and teacher must have the same dtype");
    CHECK_VALUE(teacher.raw.N == student.raw.N && teacher.raw.M == student.raw.M,
                "student and teacher must have the same numbers of rows");
    CHECK_VALUE(student.sets.size() == 1 && student.folds.empty() && dims >= 0 && dims <= 3,
                "similarity_distill takes one set and no fold");
    CHECK_VALUE(student.raw.self == teacher.raw.self, "y and teacher_y must be given both, or none");
    CHECK_VALUE(!student.raw.self || (dims == 1 && kind != "reverse_kl" && kind != "js"),
                "y must be given for lines of columns, and for kinds whose entries may be decided");
    student.keep(kept, 0, 2);
    teacher.keep(kept, 1, 2);
    raw = {student.raw, teacher.raw, distill_kind_of(kind), delta, (dims & 1) != 0, (dims & 2) != 0};
  }
  // One set that no rule belongs to, as core/problem.py encodes it.
  static Problem plain_problem(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& row_bias,
                               const Tensor& col_bias) {
    const ScaleOf scale_of = scale.numel() == 1 ? ScaleOf::all : ScaleOf::rows;
    const int64_t spec[] = {1, 0, static_cast<int64_t>(scale_of), 0, 0, 0, 0};
    return Problem(x, y, scale, row_bias, col_bias, Tensor(), TensorList(), {spec, 7});
  }
  int64_t lines() const { return (raw.rows ? raw.student.N : 0) + (raw.cols ? raw.student.M : 0); }
  bool has_statistics() const { return raw.kind != DistillKind::huber && raw.kind != DistillKind::distance; }
  Shape statistics() const { return {5, has_statistics() ? lines() : 0}; }
};

std::tuple<Tensor, Tensor, Tensor> similarity_distill_forward(
    const Tensor& x, const Optional& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Tensor& teacher_x, const Optional& teacher_y, const Tensor& teacher_scale, const Optional& teacher_row_bias,
    const Optional& teacher_col_bias, const TensorList& pair_data, const Integers& spec, const std::string& kind,
    double delta, int64_t dims, int64_t kept_size) {
  const Tensor kept = empty({kept_size}, accumulator(x.type));
  const DistillProblems p(x, y, scale, row_bias, col_bias, teacher_x, teacher_y, teacher_scale, teacher_row_bias,
                          teacher_col_bias, pair_data, spec, kind, delta, dims, kept);
  const Type type = p.student.type();
  const Tensor values = zeros({p.lines()}, type), statistics = zeros(p.statistics(), type);
  // Lines without any pair, also where there is no chunk that says so.
  const double none = -std::numeric_limits<double>::infinity();
  for (const int row : {0, 2}) fill(statistics, row * statistics.size(1), statistics.size(1), none);
  run(similarity_distill_cpu().forward, p.raw,
      DistillForward{values.data, p.has_statistics() ? statistics.data : nullptr});
  return {values, statistics, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_distill_backward(
    const Tensor& x, const Optional& y, const Tensor& scale, const Optional& row_bias, const Optional& col_bias,
    const Tensor& teacher_x, const Optional& teacher_y, const Tensor& teacher_scale, const Optional& teacher_row_bias,
    const Optional& teacher_col_bias, const TensorList& pair_data, const Integers& spec, const std::string& kind,
    double delta, int64_t dims, const Tensor& statistics, const Tensor& d_values, const Tensor& kept, int64_t needs) {
  const DistillProblems p(x, y, scale, row_bias, col_bias, teacher_x, teacher_y, teacher_scale, teacher_row_bias,
                          teacher_col_bias, pair_data, spec, kind, delta, dims, kept);
  const Type type = p.student.type();
  const Tensor known = shaped(statistics, p.statistics(), type, "statistics");
  const Tensor upstream = shaped(d_values, {p.lines()}, type, "d_values");
  const Gradients gradients(p.student, needs);
  run(similarity_distill_cpu().backward, p.raw,
      DistillBackward{known.size(1) ? known.data : nullptr, upstream.data, gradients.raw});
  return gradients.all();
}

}  // namespace
}  // namespace contrastive_ops
