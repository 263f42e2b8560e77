// Part of bindings.cpp, the only file that includes it: the functions of similarity_distill.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "bindings_similarity_gradients.h"
#include "similarity_distill.h"

namespace contrastive_ops {
namespace {

DistillKind distill_kind_of(const std::string& name) {
  const char* names[] = {"kl", "reverse_kl", "ce", "js", "huber", "distance"};
  for (int kind = 0; kind < 6; ++kind) {
    if (name == names[kind]) return static_cast<DistillKind>(kind);
  }
  TORCH_CHECK_VALUE(false, "similarity_distill: kind must be one of the known ones, got ", name);
}

// One set that no rule belongs to, as core/problem.py encodes it.
std::vector<int64_t> plain_set(const Tensor& scale) {
  return {1, 0, static_cast<int64_t>(scale.numel() == 1 ? ScaleOf::all : ScaleOf::rows), 0, 0, 0, 0};
}

// Both problems with the tensors that their pointers point into.
struct DistillProblems {
  std::vector<Tensor> no_data;
  std::vector<int64_t> teacher_spec;
  Problem student, teacher;
  DistillProblem raw{};

  DistillProblems(const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
                  const OptionalTensor& col_bias, const Tensor& teacher_x, const Tensor& teacher_y,
                  const Tensor& teacher_scale, const OptionalTensor& teacher_row_bias,
                  const OptionalTensor& teacher_col_bias, const std::vector<Tensor>& pair_data,
                  const std::vector<int64_t>& spec, const std::string& kind, double delta, int64_t dims,
                  const Tensor& kept)
      : teacher_spec(plain_set(teacher_scale)),
        student(x, y, scale, row_bias, col_bias, std::nullopt, pair_data, spec),
        teacher(teacher_x, teacher_y, teacher_scale, teacher_row_bias, teacher_col_bias, std::nullopt, no_data,
                teacher_spec) {
    TORCH_CHECK_TYPE(teacher_x.scalar_type() == x.scalar_type(), "student and teacher must have the same dtype");
    TORCH_CHECK_VALUE(teacher.raw.N == student.raw.N && teacher.raw.M == student.raw.M,
                      "student and teacher must have the same numbers of rows");
    TORCH_CHECK_VALUE(student.sets.size() == 1 && student.folds.empty() && dims >= 0 && dims <= 3,
                      "similarity_distill takes one set and no fold");
    const int64_t half = kept.numel() / 2;
    student.keep(kept.narrow(0, 0, half));
    teacher.keep(kept.narrow(0, half, half));
    raw.student = student.raw;
    raw.teacher = teacher.raw;
    raw.kind = distill_kind_of(kind);
    raw.delta = delta;
    raw.rows = (dims & 1) != 0;
    raw.cols = (dims & 2) != 0;
  }
  int64_t lines() const { return (raw.rows ? raw.student.N : 0) + (raw.cols ? raw.student.M : 0); }
  bool has_statistics() const { return raw.kind != DistillKind::huber && raw.kind != DistillKind::distance; }
};

std::tuple<Tensor, Tensor, Tensor> similarity_distill_forward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const Tensor& teacher_x, const Tensor& teacher_y, const Tensor& teacher_scale,
    const OptionalTensor& teacher_row_bias, const OptionalTensor& teacher_col_bias,
    const std::vector<Tensor>& pair_data, const std::vector<int64_t>& spec, const std::string& kind, double delta,
    int64_t dims, int64_t kept_size) {
  const Tensor kept = at::empty({kept_size}, x.options().dtype(accumulator(x)));
  const DistillProblems p(x, y, scale, row_bias, col_bias, teacher_x, teacher_y, teacher_scale, teacher_row_bias,
                          teacher_col_bias, pair_data, spec, kind, delta, dims, kept);
  Tensor values = p.student.zeros({p.lines()});
  Tensor statistics = p.student.zeros({5, p.has_statistics() ? p.lines() : 0});
  // Lines without any pair, also where there is no chunk that says so.
  for (int row : {0, 2}) statistics.select(0, row).fill_(-std::numeric_limits<double>::infinity());
  const DistillForward out{values.data_ptr(), p.has_statistics() ? statistics.data_ptr() : nullptr};
  {
    pybind11::gil_scoped_release release;
    similarity_distill_cpu().forward(p.raw, out, parallel());
  }
  return {values, statistics, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_distill_backward(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& row_bias,
    const OptionalTensor& col_bias, const Tensor& teacher_x, const Tensor& teacher_y, const Tensor& teacher_scale,
    const OptionalTensor& teacher_row_bias, const OptionalTensor& teacher_col_bias,
    const std::vector<Tensor>& pair_data, const std::vector<int64_t>& spec, const std::string& kind, double delta,
    int64_t dims, const Tensor& statistics, const Tensor& d_values, const Tensor& kept, int64_t needs) {
  const DistillProblems p(x, y, scale, row_bias, col_bias, teacher_x, teacher_y, teacher_scale, teacher_row_bias,
                          teacher_col_bias, pair_data, spec, kind, delta, dims, kept);
  const int64_t lines = p.has_statistics() ? p.lines() : 0;
  TORCH_CHECK_VALUE(statistics.sizes() == at::IntArrayRef({5, lines}) && statistics.scalar_type() == p.student.type(),
                    "statistics must come from forward");
  const Tensor known = statistics.contiguous();
  const Tensor upstream = vector_of(d_values, p.lines(), p.student.type(), "d_values");
  Gradients gradients(p.student, needs);
  const DistillBackward raw{lines ? known.data_ptr() : nullptr, upstream.data_ptr(), gradients.raw};
  {
    pybind11::gil_scoped_release release;
    similarity_distill_cpu().backward(p.raw, raw, parallel());
  }
  return {gradients.dx, gradients.dy, gradients.dscale, gradients.drow_bias, gradients.dcol_bias};
}

}  // namespace
}  // namespace contrastive_ops
