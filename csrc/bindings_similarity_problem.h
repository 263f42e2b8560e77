// Part of bindings.cpp, the only file that includes it: from the arguments of an operator to a SimilarityProblem.
#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <atomic>
#include <optional>
#include <vector>

#include "similarity_problem.h"

namespace contrastive_ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void run_in_order(int64_t count, Parallel::Task task, void* context) {
  for (int64_t index = 0; index < count; ++index) task(context, index, 0);
}

// Indices are handed out one by one: tasks differ in length, and every task owns its outputs, so who runs which
// task does not change a result.
void run_tasks(int64_t count, Parallel::Task task, void* context) {
  const int64_t workers = std::min<int64_t>(count, at::get_num_threads());
  if (workers <= 1 || at::in_parallel_region()) return run_in_order(count, task, context);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t index = next++; index < count; index = next++) task(context, index, static_cast<int>(worker));
    }
  });
}

Parallel parallel() { return {run_tasks, at::get_num_threads()}; }

at::ScalarType accumulator(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK_TYPE(false, "x must be a floating tensor, got ", x.scalar_type());
  }
}

Tensor rows_contiguous(const Tensor& x) {
  // An empty stride check: a matrix of one column may carry any column stride.
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

Tensor vector_of(const OptionalTensor& v, int64_t size, at::ScalarType type, const char* name) {
  if (!v) return Tensor();
  TORCH_CHECK_VALUE(v->dim() == 1 && v->size(0) == size, name, " must have shape (", size, "), got ", v->sizes());
  TORCH_CHECK_TYPE(v->scalar_type() == type, name, " must have dtype ", type, ", got ", v->scalar_type());
  TORCH_CHECK_VALUE(v->device().is_cpu(), name, " must be on the CPU, got ", v->device());
  return v->contiguous();
}

void* data_or_null(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// What a tensor in pair_data is: Slot in contrastive_ops/core/problem.py.
enum Slot : int64_t {
  kDifferRows,
  kDifferCols,
  kSameRows,
  kSameCols,
  kExcludeIndptr,
  kExcludeIndices,
  kBelowRows,
  kBelowCols,
  kAboveRows,
  kAboveCols,
  kGuideX,
  kGuideY,
  kGuideBelowRows,
  kGuideBelowCols,
  kClassRows,
  kClassCols,
  kLogWeight,
  kFill,
  kLinearIndptr,
  kLinearIndices,
  kLinearWeight,
  kCodeScale,
  kRowFactor,
  kColFactor,
  kSlots
};

// A SimilarityProblem with the tensors that its pointers point into.
class Problem {
 public:
  Tensor x, y, scale, row_bias, col_bias, target;
  std::vector<SimilaritySet> sets;
  std::vector<SimilarityFold> folds;
  SimilarityProblem raw{};

  Problem(const Tensor& x_in, const OptionalTensor& y_in, const Tensor& scale_in, const OptionalTensor& row_bias_in,
          const OptionalTensor& col_bias_in, const OptionalTensor& target_in, const std::vector<Tensor>& pair_data,
          const std::vector<int64_t>& spec)
      : pair_data_(pair_data), spec_(spec) {
    const Tensor y_or_x = y_in ? *y_in : x_in;
    TORCH_CHECK_VALUE(x_in.dim() == 2 && y_or_x.dim() == 2, "x and y must be matrices");
    TORCH_CHECK_VALUE(x_in.size(1) == y_or_x.size(1), "x and y must have the same last dimension");
    const bool codes = y_or_x.scalar_type() == at::kChar && x_in.scalar_type() == at::kBFloat16;
    TORCH_CHECK_TYPE(codes || x_in.scalar_type() == y_or_x.scalar_type(), "x and y must have the same dtype");
    TORCH_CHECK_VALUE(x_in.device().is_cpu() && y_or_x.device().is_cpu(), "x and y must be on the CPU");
    x = rows_contiguous(x_in);
    y = y_in ? rows_contiguous(*y_in) : x;
    row_bias = vector_of(row_bias_in, x.size(0), type(), "row_bias");
    col_bias = vector_of(col_bias_in, y.size(0), type(), "col_bias");
    target = vector_of(target_in, x.size(0), at::kLong, "target");
    raw.dtype = dtype_of(x);
    raw.x = x.data_ptr();
    raw.y = y.data_ptr();
    raw.N = x.size(0);
    raw.M = y.size(0);
    raw.D = x.size(1);
    raw.x_stride = x.stride(0);
    raw.y_stride = y.stride(0);
    raw.self = !y_in;
    raw.row_bias = data_or_null(row_bias);
    raw.col_bias = data_or_null(col_bias);
    raw.target = static_cast<const int64_t*>(data_or_null(target));
    read_spec(scale_in);
    TORCH_CHECK_TYPE(codes == (raw.code_scale != nullptr), "int8 codes must come with their scale");
  }

  at::ScalarType type() const { return accumulator(x); }
  int64_t size_of(const SimilarityFold& fold) const { return fold.cols ? raw.M : raw.N; }
  int64_t scale_size(const SimilaritySet& set) const {
    return set.scale_of == ScaleOf::all ? 1 : set.scale_of == ScaleOf::rows ? raw.N : raw.M;
  }
  int64_t total_size() const {
    int64_t total = 0;
    for (const auto& fold : folds) total += size_of(fold);
    return total;
  }
  int64_t argmax_size() const {
    int64_t total = 0;
    for (const auto& fold : folds) total += fold.kind == FoldKind::max ? size_of(fold) : 0;
    return total;
  }
  // Pointers to each fold's part of one vector; `only`: null for other kinds, which have no part.
  template <class T>
  std::vector<T*> parts(const Tensor& whole, const FoldKind* only = nullptr) const {
    std::vector<T*> result;
    char* at = static_cast<char*>(data_or_null(whole));
    for (const auto& fold : folds) {
      const bool has = at != nullptr && (only == nullptr || fold.kind == *only);
      result.push_back(has ? reinterpret_cast<T*>(at) : nullptr);
      if (has) at += size_of(fold) * whole.element_size();
    }
    return result;
  }

  void keep(const Tensor& kept) {
    if (kept.numel() == 0) return;
    TORCH_CHECK_VALUE(kept.is_contiguous() && kept.scalar_type() == type(), "kept must come from forward");
    raw.kept = kept.data_ptr();
    raw.kept_size = kept.numel();
  }
  Tensor empty(int64_t size) const { return at::empty({size}, x.options().dtype(type())); }
  Tensor zeros(at::IntArrayRef shape) const { return at::zeros(shape, x.options().dtype(type())); }
  // What the kernels sum over pairs: their first pairs write it.
  Tensor sums(at::IntArrayRef shape) const {
    return raw.N > 0 && raw.M > 0 ? at::empty(shape, x.options().dtype(type())) : zeros(shape);
  }

 private:
  int64_t next() {
    TORCH_CHECK_VALUE(at_ < spec_.size(), "spec must describe all sets and folds");
    return spec_[at_++];
  }

  void read_spec(const Tensor& scale_in) {
    const int64_t set_count = next(), fold_count = next();
    for (int64_t k = 0; k < set_count; ++k) {
      SimilaritySet set{};
      set.scale_of = static_cast<ScaleOf>(next());
      set.negate = next() != 0;
      set.has_diagonal = next() != 0;
      set.diagonal = next();
      Tensor slots[kSlots];
      for (int64_t entries = next(); entries > 0; --entries) {
        const int64_t slot = next();
        TORCH_CHECK_VALUE(slot >= 0 && slot < kSlots && used_ < pair_data_.size(), "spec must match pair_data");
        slots[slot] = pair_data_[used_++];
      }
      read_rules(slots, set);
      if (k == 0) {
        read_linear(slots);
        raw.code_scale = numbers(slots[kCodeScale], raw.M, "code_scale");
        raw.x_factor = numbers(slots[kRowFactor], raw.N, "row_factor");
        raw.y_factor = numbers(slots[kColFactor], raw.M, "col_factor");
      }
      sets.push_back(set);
    }
    for (int64_t k = 0; k < fold_count; ++k) {
      const int64_t set = next(), kind = next(), cols = next();
      TORCH_CHECK_VALUE(set >= 0 && set < set_count && kind >= 0 && kind <= 5, "spec must name sets and kinds");
      folds.push_back({static_cast<int>(set), static_cast<FoldKind>(kind), cols != 0});
    }
    int64_t total = 0;
    for (const auto& set : sets) total += scale_size(set);
    scale = vector_of(scale_in, total, type(), "scale");
    char* at = static_cast<char*>(scale.data_ptr());
    for (auto& set : sets) {
      set.scale = at;
      at += scale_size(set) * scale.element_size();
    }
    raw.sets = sets.data();
    raw.set_count = static_cast<int>(sets.size());
    raw.folds = folds.data();
    raw.fold_count = static_cast<int>(folds.size());
  }

  const int64_t* ids(const Tensor& t, int64_t size, const char* name) {
    return static_cast<const int64_t*>(vector(t, size, at::kLong, name));
  }
  const void* numbers(const Tensor& t, int64_t size, const char* name) { return vector(t, size, type(), name); }
  const void* vector(const Tensor& t, int64_t size, at::ScalarType dtype, const char* name) {
    if (!t.defined()) return nullptr;
    owned_.push_back(vector_of(t, size, dtype, name));
    return owned_.back().data_ptr();
  }
  const void* matrix(const Tensor& t, int64_t rows, int64_t cols, const char* name) {
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must have shape (", rows, ", ",
                      cols, "), got ", t.sizes());
    return numbers(t.reshape({rows * cols}), rows * cols, name);
  }
  // Lists address memory, so every entry is checked once more.
  void lists(const Tensor& indptr, const Tensor& indices, const int64_t*& indptr_out, const int64_t*& indices_out) {
    if (!indptr.defined()) return;
    indptr_out = ids(indptr, raw.N + 1, "indptr");
    indices_out = ids(indices, indices.numel(), "indices");
    TORCH_CHECK_VALUE(indptr_out[0] == 0 && indptr_out[raw.N] == indices.numel(), "indptr must span the indices");
    for (int64_t i = 0; i < raw.N; ++i) TORCH_CHECK_VALUE(indptr_out[i] <= indptr_out[i + 1], "indptr must not fall");
    for (int64_t e = 0; e < indices.numel(); ++e) {
      TORCH_CHECK_VALUE(indices_out[e] >= 0 && indices_out[e] < raw.M, "indices must be below ", raw.M);
    }
  }
  void read_rules(const Tensor* slots, SimilaritySet& set) {
    set.differ_rows = ids(slots[kDifferRows], raw.N, "differ");
    set.differ_cols = ids(slots[kDifferCols], raw.M, "differ");
    set.same_rows = ids(slots[kSameRows], raw.N, "same");
    set.same_cols = ids(slots[kSameCols], raw.M, "same");
    lists(slots[kExcludeIndptr], slots[kExcludeIndices], set.exclude_indptr, set.exclude_indices);
    set.below_rows = numbers(slots[kBelowRows], raw.N, "below");
    set.below_cols = numbers(slots[kBelowCols], raw.M, "below");
    set.above_rows = numbers(slots[kAboveRows], raw.N, "above");
    set.above_cols = numbers(slots[kAboveCols], raw.M, "above");
    if (slots[kGuideX].defined()) {
      const Tensor &gx = slots[kGuideX], &gy = slots[kGuideY];
      TORCH_CHECK_VALUE(gx.dim() == 2 && gy.defined(), "guide must be two matrices");
      raw.guide_depth = gx.size(1);
      raw.guide_x = matrix(gx, raw.N, raw.guide_depth, "guide_x");
      raw.guide_y = gy.is_same(gx) ? raw.guide_x : matrix(gy, raw.M, raw.guide_depth, "guide_y");
      set.guide_below_rows = numbers(slots[kGuideBelowRows], raw.N, "guide_below");
      set.guide_below_cols = numbers(slots[kGuideBelowCols], raw.M, "guide_below");
    }
    if (slots[kLogWeight].defined()) {
      const Tensor& table = slots[kLogWeight];
      TORCH_CHECK_VALUE(table.dim() == 2, "log_weight must be a matrix");
      set.log_weight_rows = table.size(0);
      set.log_weight_cols = table.size(1);
      set.log_weight = matrix(table, table.size(0), table.size(1), "log_weight");
      set.class_rows = classes(slots[kClassRows], raw.N, table.size(0));
      set.class_cols = classes(slots[kClassCols], raw.M, table.size(1));
    }
    set.has_fill = slots[kFill].defined();
    if (set.has_fill) set.fill = slots[kFill].item<double>();
  }
  const int64_t* classes(const Tensor& t, int64_t size, int64_t count) {
    const int64_t* found = ids(t, size, "classes");
    TORCH_CHECK_VALUE(found != nullptr || size == 0, "log_weight needs classes");
    for (int64_t k = 0; k < size; ++k) TORCH_CHECK_VALUE(found[k] < count, "classes must be below ", count);
    return found;
  }
  void read_linear(const Tensor* slots) {
    lists(slots[kLinearIndptr], slots[kLinearIndices], raw.linear_indptr, raw.linear_indices);
    if (raw.linear_indptr) raw.linear_weight = numbers(slots[kLinearWeight], slots[kLinearIndices].numel(), "linear");
  }

  const std::vector<Tensor>& pair_data_;
  const std::vector<int64_t>& spec_;
  size_t at_ = 0, used_ = 0;
  std::vector<Tensor> owned_;
};

}  // namespace
}  // namespace contrastive_ops
