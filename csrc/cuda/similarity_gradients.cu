// Gradients of folds on a GPU: inner products of a chunk become the weights of the library products that follow.
//
// A weight is dtotal/d(inner product), summed over all sets and folds in float32 and rounded once, to the dtype of the
// operands. Per pair 4 bytes are read and 2 written (4 for float32), beside the 6 D
// operations of the three products: at D of 1024 they take some ten times as long.
#include "launch.h"
#include "similarity_chunk.h"
#include "similarity_plain.h"
#include "similarity_reduce.h"
#include "similarity_sums.h"

namespace contrastive_ops {
namespace {

// ---- Derivatives by logits ------------------------------------------------------------------------------------------

// dtotal/dl of the pair (i, j) in one set, whatever the rules are; `place` is where the pair stands in the chunk.
__device__ inline float derivative(const PairArguments& p, const Upstreams& up, int s, float dot, float guide,
                                   int64_t i, int64_t j, const float* d_linear, int64_t place) {
  const PairSet& set = p.sets[s];
  float e = 0.0f;
  if (p.target && p.target[i] == j) {
    if (s == 0 && up.d_target) e = up.d_target[i];
  } else if (!(set.drops && dropped(set, dot, guide, i, j))) {
    const float z = logit_of(p, set, dot, i, j);
    for (int f = 0; z != -kInfinity && f < p.fold_count; ++f) {
      const PairFold& fold = p.folds[f];
      const Upstream& from = up.folds[f];
      if (fold.set != s || from.d_value == nullptr || fold.kind == FoldKind::count) continue;
      const int64_t own = fold.cols ? j : i;
      if (fold.kind == FoldKind::max) {
        if (from.argmax[own] == (fold.cols ? i : j)) e += from.d_value[own];
      } else {
        e += from.d_value[own] * slope(fold.kind, z, from.value[own]);
      }
    }
  }
  if (s == 0 && d_linear != nullptr) e += d_linear[place];
  return e;
}

// ---- Weights of a tile ----------------------------------------------------------------------------------------------

// dtotal/dl of the pairs in the columns of a lane, both ways, for one set.
template <Path path>
struct Derivatives {
  const PairArguments& p;
  const Upstreams& up;
  const PairChunk& chunk;
  const PlainFolds folds;
  // Of the columns, in plain calls.
  Columns values, d_values, d_targets;
  int targets[kColumns];

  __device__ Derivatives(const PairArguments& arguments, const Upstreams& upstreams, const PairChunk& rectangle,
                         const PlainFolds plain, const Tile& tile)
      : p(arguments), up(upstreams), chunk(rectangle), folds(plain), values{}, d_values{}, d_targets{}, targets{} {
    if constexpr (path == Path::plain_itself) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int64_t j = chunk.first_col + tile.column(k);
        const bool inside = tile.column(k) < chunk.cols;
        const Side side(p, up, col_fold(), j, inside);
        values[k] = side.value, d_values[k] = side.d_value;
        targets[k] = inside ? target_of(p, j) : -1;
        d_targets[k] = up.d_target && inside ? up.d_target[j] : 0.0f;
      }
    }
  }

  // The fold that a plain call has gives to the row of a tile through one view of a pair and to its column through the
  // other.
  __device__ int row_fold() const { return folds.rows < 0 ? folds.cols : folds.rows; }
  __device__ int col_fold() const { return folds.cols < 0 ? folds.rows : folds.cols; }

  // For pair k of the row: `use(k, direct, mirrored)`, 0 where there is no such view.
  template <class Use>
  __device__ void each(const Tile& tile, int s, int row, const Columns& dots, const Columns& guide,
                       const Use& use) const {
    const int i = chunk.first_row + row;
    if constexpr (path == Path::general) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int column = tile.column(k), j = chunk.first_col + column;
        const bool inside = column < chunk.cols;
        const int64_t place = row * chunk.pitch + column, plane = chunk.rows * chunk.pitch;
        float views[2] = {};
        // A loop, so that the rules are compiled once for both.
        for (int mirrored = 0; mirrored < 1 + chunk.itself; ++mirrored) {
          if (!inside || (chunk.itself && j < i + mirrored)) continue;
          const int64_t at = mirrored ? plane + place : place;
          const float e = derivative(p, up, s, dots[k], guide[k], mirrored ? j : i, mirrored ? i : j, up.d_linear, at);
          views[0] = mirrored ? views[0] : e, views[1] = mirrored ? e : views[1];
        }
        use(k, views[0], views[1]);
      }
    } else {
      const PairSet& set = p.sets[0];
      const PlainRow own(p, set, i);
      const Side of_row(p, up, row_fold(), i, true);
      const float d_target = up.d_target ? up.d_target[i] : 0.0f;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const int column = tile.column(k), j = chunk.first_col + column;
        const bool inside = column < chunk.cols;
        const float z = own.logit(dots[k]);
        const bool has_slope = inside && z != -kInfinity;
        Side of_col = of_row;
        of_col.kind = col_fold() < 0 ? FoldKind::count : p.folds[col_fold()].kind;
        of_col.value = values[k], of_col.d_value = d_values[k];
        const bool other_leaves_out = targets[k] == i || (set.has_diagonal && j + set.diagonal == i);
        const bool by_cols = folds.rows < 0;
        float direct = 0.0f, mirrored = 0.0f;
        if (has_slope && j >= i && !own.leaves_out(j)) direct = by_cols ? of_col(z) : of_row(z);
        if (has_slope && j > i && !other_leaves_out) mirrored = by_cols ? of_row(z) : of_col(z);
        if (inside && j >= i && j == own.target) direct = d_target;
        if (inside && j > i && targets[k] == i) mirrored = d_targets[k];
        use(k, direct, mirrored);
      }
    }
  }
};

// What a pair adds to the sum of a slot.
__device__ inline float summed(const Slot& slot, float direct, float mirrored, float dot, bool negate) {
  float e = (slot.direct ? direct : 0.0f) + (slot.mirrored ? mirrored : 0.0f);
  if (slot.what == SumOf::scale) e = e == 0.0f ? 0.0f : e * dot;
  return negate ? -e : e;
}

template <Path path>
__global__ void __launch_bounds__(kThreads, 2)
    weigh_kernel(const __grid_constant__ PairArguments p, const __grid_constant__ Upstreams up, const PlainFolds folds,
                 const PairChunk chunk, const __grid_constant__ Slots slots, const float* norm, const Output weights,
                 float* parts) {
  const Tile tile(chunk);
  const bool empty = tile.below_diagonal(chunk);
  const Derivatives<path> derivatives(p, up, chunk, folds, tile);
  const float up_by = norm == nullptr ? 1.0f : *norm, down_by = 1.0f / up_by;
  const int64_t row_parts = int64_t{chunk.tiles_across()} * chunk.rows;
  Columns col_sums[kColSlots] = {}, guide = {};
  for (int row = tile.first_row + tile.warp; row < tile.last_row; row += kWarps) {
    const int i = chunk.first_row + row;
    Columns g = {}, dots = {};
    float row_sums[kRowSlots] = {};
    if (!empty) {
      tile.load(chunk, chunk.dots, row, dots);
      if (path == Path::general && chunk.guide) tile.load(chunk, chunk.guide, row, guide);
      for (int s = 0; s < (path == Path::general ? p.set_count : 1); ++s) {
        const PairSet& set = p.sets[s];
        const float factor = path == Path::general ? 0.0f : scale_factor(set, i, 0);
        derivatives.each(tile, s, row, dots, guide, [&](int k, float direct, float mirrored) {
          const int j = chunk.first_col + tile.column(k);
          // What is outside the chunk is 0, and has no scale to read.
          if (direct != 0.0f) g[k] += direct * (path == Path::general ? scale_factor(set, i, j) : factor);
          if (mirrored != 0.0f) g[k] += mirrored * (path == Path::general ? scale_factor(set, j, i) : factor);
          CONTRASTIVE_OPS_UNROLL
          for (int n = 0; n < kRowSlots; ++n) {
            const Slot& slot = slots.rows[n];
            if (n >= slots.row_count || slot.what == SumOf::residual || (slot.set >= 0 && slot.set != s)) continue;
            row_sums[n] += summed(slot, direct, mirrored, dots[k], set.negate);
          }
          CONTRASTIVE_OPS_UNROLL
          for (int n = 0; n < kColSlots; ++n) {
            const Slot& slot = slots.cols[n];
            if (n >= slots.col_count || slot.what == SumOf::residual || (slot.set >= 0 && slot.set != s)) continue;
            col_sums[n][k] += summed(slot, direct, mirrored, dots[k], set.negate);
          }
        });
      }
    }
    // Of the column of a lane, with the row's: what the inner product was multiplied by.
    const auto unit_factor = [&](int k) {
      return tile.column(k) < chunk.cols ? p.row_factor[i] * p.col_factor[chunk.first_col + tile.column(k)] : 1.0f;
    };
    if (weights.data != nullptr) {
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) g[k] *= p.row_factor ? up_by * unit_factor(k) : up_by;
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; k += kLoad) {
        const bool inside = tile.column(k) < chunk.cols;
        const int64_t at = row * chunk.pitch + tile.column(k);
        if (weights.dtype == DType::bfloat16) {
          round_and_store(g + k, static_cast<BFloat16*>(weights.data) + at, inside);
        } else if (weights.dtype == DType::float16) {
          round_and_store(g + k, static_cast<Float16*>(weights.data) + at, inside);
        } else {
          round_and_store(g + k, static_cast<float*>(weights.data) + at, inside);
        }
      }
      CONTRASTIVE_OPS_UNROLL
      for (int k = 0; k < kColumns; ++k) g[k] *= p.row_factor ? down_by / unit_factor(k) : down_by;
      CONTRASTIVE_OPS_UNROLL
      for (int n = 0; n < kRowSlots; ++n) {
        if (n >= slots.row_count || slots.rows[n].what != SumOf::residual) continue;
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) row_sums[n] += g[k];
      }
      CONTRASTIVE_OPS_UNROLL
      for (int n = 0; n < kColSlots; ++n) {
        if (n >= slots.col_count || slots.cols[n].what != SumOf::residual) continue;
        CONTRASTIVE_OPS_UNROLL
        for (int k = 0; k < kColumns; ++k) col_sums[n][k] += g[k];
      }
    }
    CONTRASTIVE_OPS_UNROLL
    for (int n = 0; n < kRowSlots; ++n) {
      if (n >= slots.row_count) break;
      const float sum = fold_warp(row_sums[n], [](float a, float b) { return a + b; });
      if (tile.lane == 0) parts[n * row_parts + int64_t{tile.across} * chunk.rows + row] = sum;
    }
  }
  parts += slots.row_count * row_parts;
  float* shared = shared_memory<float>();
  CONTRASTIVE_OPS_UNROLL
  for (int n = 0; n < kColSlots; ++n) {
    if (n >= slots.col_count) break;
    store_column_sums(chunk, tile, col_sums[n], shared, parts + int64_t{n} * chunk.tiles_down() * chunk.cols);
  }
}

// Adds the parts of a chunk to the totals, tile after tile, in float64 (similarity_folds.h says why); one thread per
// row and column.
__global__ void add_parts_kernel(const PairChunk chunk, const __grid_constant__ Slots slots, const float* parts,
                                 double* totals) {
  const OwnedPlaces own(chunk, int64_t{blockIdx.x} * kThreads + threadIdx.x);
  const int across = chunk.tiles_across(), down = chunk.tiles_down();
  const auto add = [&](const float* from, int tiles, int64_t stride, int64_t to) {
    // Several loads are under way at a time.
    constexpr int kAtOnce = 8;
    double sum = totals[to];
    float next[kAtOnce];
    for (int t = 0; t < tiles; t += kAtOnce) {
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < kAtOnce; ++q) next[q] = t + q < tiles ? from[(t + q) * stride] : 0.0f;
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < kAtOnce; ++q) sum += static_cast<double>(next[q]);
    }
    totals[to] = sum;
  };
  for (int n = 0; own.row >= 0 && n < slots.row_count; ++n) {
    const float* from = parts + int64_t{n} * across * chunk.rows;
    add(from + own.row, across, chunk.rows, slots.rows[n].begin + chunk.first_row + own.row);
  }
  const float* of_cols = parts + int64_t{slots.row_count} * across * chunk.rows;
  for (int n = 0; own.col >= 0 && n < slots.col_count; ++n) {
    const float* from = of_cols + int64_t{n} * down * chunk.cols;
    add(from + own.col, down, chunk.cols, slots.cols[n].begin + chunk.first_col + own.col);
  }
}

// ---- Lists, and errors of rounding ----------------------------------------------------------------------------------

// One thread per row that may name a pair of the chunk: a list may name a column twice.
__global__ void spread_kernel(const __grid_constant__ PairArguments p, const PairChunk chunk, int64_t owners,
                              const float* d_linear, float* spread) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= owners) return;
  const int64_t owner = chunk.first_row + at, plane = chunk.rows * chunk.pitch;
  for (int64_t e = p.linear_indptr[owner]; e < p.linear_indptr[owner + 1]; ++e) {
    const int64_t j = p.linear_indices[e], place = place_of(chunk, owner, j);
    if (place < 0) continue;
    spread[(chunk.itself && j < owner ? plane : 0) + place] += d_linear[owner] * p.linear_weight[e];
  }
}

// One thread per row; a maximum of integers does not depend on the order of writes.
__global__ void partners_kernel(const int64_t* target, int64_t N, int64_t M, long long* partner) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < N && target[row] >= 0 && target[row] < M) atomicMax(partner + target[row], static_cast<long long>(row));
}

// One warp per row.
template <class T, int width>
__global__ void give_back_kernel(float* gradient, const double* residual, const int64_t* partner, const T* other,
                                 int64_t size, int64_t D, int64_t others) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= size || partner[row] < 0 || partner[row] >= others) return;
  const float weight = static_cast<float>(residual[row]);
  auto* to = reinterpret_cast<Pack<float, width>*>(gradient + row * D);
  const auto* from = reinterpret_cast<const Pack<T, width>*>(other + partner[row] * D);
  for (int64_t at = threadIdx.x % kWarp; at < D / width; at += kWarp) {
    Pack<float, width> values = to[at];
    const Pack<T, width> mate = from[at];
    for (int q = 0; q < width; ++q) values.at[q] += weight * to_float(mate.at[q]);
    to[at] = values;
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------

Upstreams upstreams_of(const PairArguments& p, const float* values, const int64_t* argmax, const float* d_values,
                       const float* d_target, const float* d_linear) {
  Upstreams up{};
  up.d_target = d_target, up.d_linear = d_linear;
  for (int f = 0; f < p.fold_count && d_values != nullptr; ++f) {
    const int64_t size = p.folds[f].cols ? p.M : p.N;
    up.folds[f] = {values, d_values, argmax};
    values += size, d_values += size;
    if (p.folds[f].kind == FoldKind::max) argmax += size;
  }
  return up;
}

// Whether the kernel of plain calls has all that is asked for, and which folds it reads.
Path path_of(const PairArguments& p, const Upstreams& up, bool itself, PlainFolds& folds) {
  folds = {-1, -1};
  if (p.set_count != 1 || !is_plain(p, p.sets[0], itself) || up.d_linear) return Path::general;
  if (p.row_factor && !itself) return Path::general;  // the kernel of plain rectangles has no registers left for them
  for (int f = 0; f < p.fold_count; ++f) {
    if (!up.folds[f].d_value || p.folds[f].kind == FoldKind::count) continue;
    int& own = p.folds[f].cols ? folds.cols : folds.rows;
    if (own >= 0 || p.folds[f].kind == FoldKind::max) return Path::general;
    own = f;
  }
  if (itself && folds.rows >= 0 && folds.cols >= 0) return Path::general;
  return itself ? Path::plain_itself : Path::plain;
}

// Puts sums into slots until either side is full; those that are left wait for another pass.
class Packer {
 public:
  Packer(const PairArguments& p, bool itself, const Integers& sums) : p_(p), itself_(itself), sums_(sums) {
    if (sums.size % 4 != 0) throw std::invalid_argument("sums: they must have four numbers each");
  }

  // Calls `run` with slots, those of the residual last, as that pass writes weights.
  template <class Run>
  void each_pass(const Run& run) {
    Slots last{};
    int64_t taken = 0;
    // Residuals come first in the list.
    while (taken < sums_.size && add(last, taken)) taken += 4;
    while (taken < sums_.size) {
      Slots slots{};
      while (taken < sums_.size && add(slots, taken)) taken += 4;
      run(slots, false);
    }
    run(last, true);
  }

 private:
  bool add(Slots& slots, int64_t at) const {
    const int64_t* n = sums_.data + at;
    const auto what = static_cast<SumOf>(n[0]);
    const int set = static_cast<int>(n[1]);
    const bool cols = n[2] != 0;
    const bool of_all = what == SumOf::scale && p_.sets[set].scale_of == ScaleOf::all;
    const bool by_rows = itself_ || !cols, by_cols = (itself_ && !of_all) || (!itself_ && cols);
    if (slots.row_count + by_rows > kRowSlots || slots.col_count + by_cols > kColSlots) return false;
    if (by_rows) slots.rows[slots.row_count++] = {what, set, of_all || !cols, itself_ && (of_all || cols), n[3]};
    if (by_cols) slots.cols[slots.col_count++] = {what, set, cols, itself_ && !cols, n[3]};
    return true;
  }

  const PairArguments& p_;
  bool itself_;
  const Integers& sums_;
};

}  // namespace

void similarity_reduce_weigh(Stream stream, const float* dots, const float* guide, Integers chunk_numbers,
                             Arrays pair_data, Integers spec, const float* scale, const float* row_bias,
                             const float* col_bias, const int64_t* target, int64_t N, int64_t M, const float* values,
                             const int64_t* argmax, const float* d_values, const float* d_target, const float* d_linear,
                             const float* norm, Output weights, Integers sums, float* parts, double* totals) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const PairChunk chunk = chunk_of(dots, guide, chunk_numbers);
  const Upstreams up = upstreams_of(p, values, argmax, d_values, d_target, d_linear);
  PlainFolds folds;
  const Path path = path_of(p, up, chunk.itself, folds);
  Packer(p, chunk.itself, sums).each_pass([&](const Slots& slots, bool writes) {
    const bool stores = writes && weights.data != nullptr;
    if (stores || slots.row_count + slots.col_count > 0) {
      const Output to = stores ? weights : Output{nullptr, DType::float32};
      if (path == Path::plain) {
        weigh_plain(stream, p, up, folds, chunk, slots, norm, to, parts);
      } else {
        const auto kernel = path == Path::plain_itself ? weigh_kernel<Path::plain_itself> : weigh_kernel<Path::general>;
        const size_t shared = slots.col_count > 0 ? sizeof(float) * kWarps * kTileColumns : 0;
        launch(kernel, chunk.tiles(), kThreads, shared, stream, p, up, folds, chunk, slots, norm, to, parts);
      }
    }
    if (totals != nullptr && slots.row_count + slots.col_count > 0) {
      launch(add_parts_kernel, ceil_divide(int64_t{chunk.rows} + chunk.cols, kThreads), kThreads, 0, stream, chunk,
             slots, parts, totals);
    }
  });
}

void similarity_reduce_spread(Stream stream, Integers chunk_numbers, Arrays pair_data, Integers spec,
                              const float* d_linear, int64_t N, int64_t M, float* spread) {
  const PairArguments p = pairs_of(pair_data, spec, nullptr, nullptr, nullptr, nullptr, N, M);
  const PairChunk chunk = chunk_of(nullptr, nullptr, chunk_numbers);
  const int64_t owners = chunk.itself ? N - chunk.first_row : chunk.rows;
  launch(spread_kernel, ceil_divide(owners, kThreads), kThreads, 0, stream, p, chunk, owners, d_linear, spread);
}

void similarity_reduce_partners(Stream stream, const int64_t* target, int64_t N, int64_t M, int64_t* partner) {
  static_assert(sizeof(long long) == sizeof(int64_t), "what atomicMax takes");
  launch(partners_kernel, ceil_divide(N, kThreads), kThreads, 0, stream, target, N, M,
         reinterpret_cast<long long*>(partner));
}

void similarity_reduce_give_back(Stream stream, float* gradient, const double* residual, const int64_t* partner,
                                 Input other, int64_t size, int64_t D, int64_t others) {
  with_type(other.dtype, [&](auto type) {
    using T = decltype(type);
    const bool packs = is_aligned16(gradient) && is_aligned16(other.data) && D % kLoad == 0;
    const auto kernel = packs ? give_back_kernel<T, kLoad> : give_back_kernel<T, 1>;
    launch(kernel, ceil_divide(size, kWarps), kThreads, 0, stream, gradient, residual, partner, other.as<T>(), size, D,
           others);
  });
}

}  // namespace contrastive_ops
