// From `pair_data` and `spec` (contrastive_ops/core/problem.py) to a SimilarityProblem: the one decoder of cpu/ and
// cuda/.
//
//   spec = [sets, folds,
//           per set:  scale_of, negate, has_diagonal, diagonal, entries, slot of each entry in pair_data,
//           per fold: set, kind, cols]
#pragma once

#include <algorithm>
#include <vector>

#include "array.h"
#include "similarity_problem.h"
#include "slots.h"

namespace contrastive_ops {

// Diagonals are brought within it: beyond every column, and sums with numbers of rows do not overflow.
constexpr int64_t kNoColumn = INT64_MAX / 2;

// A SimilarityProblem with the sets and folds that it points to. The arrays of pair_data must be contiguous, and live
// as long as this.
struct DecodedProblem {
  std::vector<SimilaritySet> sets;
  std::vector<SimilarityFold> folds;
  SimilarityProblem raw{};

  Type type() const { return raw.dtype == DType::float64 ? Type::float64 : Type::float32; }  // of logits
  int64_t size_of(const SimilarityFold& fold) const { return fold.cols ? raw.M : raw.N; }
  int64_t scale_size(const SimilaritySet& set) const {
    return set.scale_of == ScaleOf::all ? 1 : set.scale_of == ScaleOf::rows ? raw.N : raw.M;
  }
  int64_t total_scale_size() const {
    int64_t total = 0;
    for (const SimilaritySet& set : sets) total += scale_size(set);
    return total;
  }
  int64_t total_size() const {
    int64_t total = 0;
    for (const SimilarityFold& fold : folds) total += size_of(fold);
    return total;
  }
  int64_t argmax_size() const {
    int64_t total = 0;
    for (const SimilarityFold& fold : folds) total += fold.kind == FoldKind::max ? size_of(fold) : 0;
    return total;
  }

  // Reads sets and folds of a problem of which dtype, N and M are known. Lists and classes address memory, so every
  // entry of them is checked where it can be read.
  void decode(const Arrays& pair_data, const Integers& spec, bool readable) {
    int64_t at = 0, used = 0;
    const auto next = [&] {
      CHECK_VALUE(at < spec.size, "spec must describe all sets and folds");
      return spec.data[at++];
    };
    const int64_t set_count = next(), fold_count = next();
    for (int64_t k = 0; k < set_count; ++k) {
      SimilaritySet set{};
      const int64_t scale_of = next();
      CHECK_VALUE(scale_of >= 0 && scale_of < kScaleKinds, "spec must say what a scale belongs to, got ", scale_of);
      set.scale_of = static_cast<ScaleOf>(scale_of);
      set.negate = next() != 0;
      set.has_diagonal = next() != 0;
      set.diagonal = std::clamp(next(), -kNoColumn, kNoColumn);
      Seen seen;
      for (int64_t entries = next(); entries > 0; --entries) {
        const int64_t slot = next();
        CHECK_VALUE(slot >= 0 && slot < kSlots && used < pair_data.size, "spec must match pair_data");
        read_slot(static_cast<PairSlot>(slot), pair_data.data[used++], set, seen);
      }
      check_together(seen);
      if (readable) check_entries(set, seen);
      sets.push_back(set);
    }
    for (int64_t k = 0; k < fold_count; ++k) {
      const int64_t set = next(), kind = next(), cols = next();
      CHECK_VALUE(set >= 0 && set < set_count && kind >= 0 && kind < kFoldKinds, "spec must name sets and kinds");
      folds.push_back({static_cast<int>(set), static_cast<FoldKind>(kind), cols != 0});
    }
    raw.sets = sets.data();
    raw.set_count = static_cast<int>(sets.size());
    raw.folds = folds.data();
    raw.fold_count = static_cast<int>(folds.size());
  }

  // The scales of all sets, one after another.
  void set_scales(const void* scale) {
    const char* at = static_cast<const char*>(scale);
    for (SimilaritySet& set : sets) {
      set.scale = at;
      if (at) at += scale_size(set) * bytes_of(type());
    }
  }

 private:
  enum class Extent { rows, cols, row_ends, row_matrix, col_matrix, matrix, list, one };
  // What one set was given, and the sizes of what has none in the problem.
  struct Seen {
    uint64_t slots = 0;
    int64_t guide_y = 0, exclude_indices = 0, linear_indices = 0, linear_weight = 0;
    bool has(PairSlot slot) const { return (slots >> static_cast<int>(slot) & 1) != 0; }
  };

  void read_slot(PairSlot slot, const Array& array, SimilaritySet& set, Seen& seen) {
    [[maybe_unused]] constexpr Type ids = Type::int64;
    const Type numbers = type();
    SimilarityProblem& problem = raw;
    switch (slot) {
#define CONTRASTIVE_OPS_READ(name, owner, type, extent)                                  \
  case PairSlot::name:                                                                   \
    check_extent(array, Extent::extent, type, #name);                                    \
    owner.name = static_cast<decltype(owner.name)>(const_cast<const void*>(array.data)); \
    break;
      CONTRASTIVE_OPS_SLOTS(CONTRASTIVE_OPS_READ)
#undef CONTRASTIVE_OPS_READ
      case PairSlot::unit:
        break;
    }
    seen.slots |= uint64_t{1} << static_cast<int>(slot);
    if (slot == PairSlot::guide_x) raw.guide_depth = array.sizes[1];
    if (slot == PairSlot::guide_y) seen.guide_y = array.sizes[1];
    if (slot == PairSlot::exclude_indices) seen.exclude_indices = array.sizes[0];
    if (slot == PairSlot::linear_indices) seen.linear_indices = array.sizes[0];
    if (slot == PairSlot::linear_weight) seen.linear_weight = array.sizes[0];
    if (slot == PairSlot::log_weight) set.log_weight_rows = array.sizes[0], set.log_weight_cols = array.sizes[1];
  }

  void check_extent(const Array& array, Extent extent, Type type, const char* name) const {
    switch (extent) {
      case Extent::rows:
        return check_array(array, {raw.N}, type, name);
      case Extent::cols:
        return check_array(array, {raw.M}, type, name);
      case Extent::row_ends:
        return check_array(array, {raw.N + 1}, type, name);
      case Extent::list:
        return check_array(array, {array.dims == 1 ? array.sizes[0] : -1}, type, name);
      case Extent::one:
        CHECK_VALUE(array.numel() == 1, name, " must be one number, got ", array);
        break;
      case Extent::row_matrix:
      case Extent::col_matrix:
      case Extent::matrix: {
        const int64_t lines = extent == Extent::row_matrix ? raw.N : extent == Extent::col_matrix ? raw.M : -1;
        CHECK_VALUE(array.dims == 2 && (lines < 0 || array.sizes[0] == lines), name, " must have shape (",
                    lines < 0 ? std::string("rows") : text_of(lines), ", columns), got ", array);
        break;
      }
    }
    CHECK_TYPE(array.type == type, name, " must have dtype ", type, ", got ", array.type);
  }

  void check_together(const Seen& seen) const {
    const auto together = [&](PairSlot a, PairSlot b, const char* name) {
      CHECK_VALUE(seen.has(a) == seen.has(b), "spec must name both parts of ", name);
    };
    together(PairSlot::differ_rows, PairSlot::differ_cols, "differ");
    together(PairSlot::same_rows, PairSlot::same_cols, "same");
    together(PairSlot::exclude_indptr, PairSlot::exclude_indices, "exclude");
    together(PairSlot::guide_x, PairSlot::guide_y, "guide");
    together(PairSlot::class_rows, PairSlot::log_weight, "log_weight");
    together(PairSlot::class_cols, PairSlot::log_weight, "log_weight");
    together(PairSlot::linear_indptr, PairSlot::linear_indices, "linear");
    together(PairSlot::linear_indptr, PairSlot::linear_weight, "linear");
    together(PairSlot::row_factor, PairSlot::col_factor, "the factors");
    CHECK_VALUE(!seen.has(PairSlot::guide_y) || seen.guide_y == raw.guide_depth, "guide_y must have shape ",
                Shape{raw.M, raw.guide_depth}, ", got ", Shape{raw.M, seen.guide_y});
    CHECK_VALUE(seen.linear_indices == seen.linear_weight, "linear_weight must have shape ", Shape{seen.linear_indices},
                ", got ", Shape{seen.linear_weight});
  }

  void check_entries(const SimilaritySet& set, const Seen& seen) const {
    if (seen.has(PairSlot::exclude_indptr)) check_lists(set.exclude_indptr, set.exclude_indices, seen.exclude_indices);
    if (seen.has(PairSlot::linear_indptr)) check_lists(raw.linear_indptr, raw.linear_indices, seen.linear_indices);
    if (!seen.has(PairSlot::log_weight)) return;
    const auto check_classes = [](const int64_t* classes, int64_t size, int64_t count) {
      for (int64_t k = 0; k < size; ++k) CHECK_VALUE(classes[k] < count, "classes must be below ", count);
    };
    check_classes(set.class_rows, raw.N, set.log_weight_rows);
    check_classes(set.class_cols, raw.M, set.log_weight_cols);
  }
  void check_lists(const int64_t* indptr, const int64_t* indices, int64_t count) const {
    CHECK_VALUE(indptr[0] == 0 && indptr[raw.N] == count, "indptr must span the indices");
    for (int64_t i = 0; i < raw.N; ++i) CHECK_VALUE(indptr[i] <= indptr[i + 1], "indptr must not fall");
    for (int64_t e = 0; e < count; ++e) {
      CHECK_VALUE(indices[e] >= 0 && indices[e] < raw.M, "indices must be below ", raw.M);
    }
  }
};

}  // namespace contrastive_ops
