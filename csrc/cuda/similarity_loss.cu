// The loss of one chunk on a GPU: what lies between the products, the folds and the weights, in as few launches as
// there are points at which all blocks must have ended. None of it takes as long as starting it does.
#include "similarity_loss.h"

#include "../row_losses.h"
#include "launch.h"
#include "similarity_chunk.h"
#include "similarity_folds.h"
#include "similarity_pairs.h"

namespace contrastive_ops {
namespace {

// The rows of one matrix, which count as if they had length 1.
struct UnitRows {
  const void* from;
  void* to;               // or null
  float *shift, *factor;  // (size,): the factor is of inner products with what is written
  int64_t size;
};

// One warp for a row. Rows of 16 bits would lose a percent if they were divided by their length, so a power of two
// brings that into [1, 2), and inner products are multiplied by the rest.
template <class T>
__device__ void write_unit_row(const UnitRows& rows, int64_t row, int64_t D) {
  constexpr float kShortest = 1e-12f;
  const int lane = threadIdx.x % kWarp;
  const T* from = static_cast<const T*>(rows.from) + row * D;
  T* to = static_cast<T*>(rows.to) + row * D;
  float sum = 0.0f;
  for (int64_t at = lane; at < D; at += kWarp) sum = fmaf(to_float(from[at]), to_float(from[at]), sum);
  const float root = sqrtf(fold_warp(sum, [](float a, float b) { return a + b; }));
  const float length = root < kShortest ? kShortest : root;  // NaN stays
  float shift = 1.0f / length, factor = 1.0f;
  if constexpr (sizeof(T) == 2) {
    int exponent = 0;
    factor = 0.5f / frexpf(length, &exponent);
    shift = ldexpf(1.0f, min(max(1 - exponent, -126), 126));
  }
  for (int64_t at = lane; at < D; at += kWarp) to[at] = from_float<T>(to_float(from[at]) * shift);
  if (lane == 0) rows.shift[row] = shift, rows.factor[row] = factor;
}

// One thread for each row, and one warp for each unit row.
template <class T>
__global__ void prepare_kernel(const float* given_scale, float scale_number, bool inverted, const float* given_bias,
                               float bias_number, int64_t N, float* scale, float* row_bias, int64_t* target,
                               int32_t* ticket, const UnitRows x, const UnitRows y, int64_t D) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row == 0) {
    const float given = given_scale != nullptr ? *given_scale : scale_number;
    *scale = inverted ? 1.0f / given : given;
    *ticket = 0;
  }
  if (row < N && row_bias != nullptr) row_bias[row] = given_bias != nullptr ? *given_bias : bias_number;
  if (row < N && target != nullptr) target[row] = row;
  if (x.to == nullptr) return;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (warp < x.size) {
    write_unit_row<T>(x, warp, D);
  } else if (warp < x.size + y.size) {
    write_unit_row<T>(y, warp - x.size, D);
  }
}

// kLoad neighbours of a row for each thread.
__global__ void multiply_kernel(float* dots, int64_t N, int64_t M, int64_t pitch, const float* row_factor,
                                const float* col_factor) {
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLoad, row = at / pitch, first = at % pitch;
  if (row >= N) return;
  auto* to = reinterpret_cast<Pack16<float>*>(dots + at);
  Pack16<float> pack = *to;
  CONTRASTIVE_OPS_UNROLL
  for (int q = 0; q < kLoad; ++q) {
    if (first + q < M) pack.at[q] = pack.at[q] * row_factor[row] * col_factor[first + q];
  }
  *to = pack;
}

// Folds the numbers of all threads of a block, in an order that their count alone decides; thread 0 gets the result.
template <class T, class Function>
__device__ T fold_block(T value, T* shared, const Function& function) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = static_cast<int>(blockDim.x) / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step)
      shared[threadIdx.x] = function(shared[threadIdx.x], shared[threadIdx.x + step]);
    __syncthreads();
  }
  const T result = shared[0];
  __syncthreads();
  return result;
}

__device__ inline double larger(double a, double b) { return b > a || isnan(b) ? b : a; }

// What the rows' losses and slopes are made into.
struct RowOutputs {
  int32_t* ticket;
  double* sums;
  float *values, *slopes, *loss, *norm;
};

// The value of a fold of row or column `place`, from what each tile found.
__device__ inline float value_of(FoldKind kind, const Part* parts, int tiles, int64_t stride, int64_t place) {
  State state{};
  for (int t = 0; t < tiles; ++t) merge_into(state, kind, parts[t * stride + place]);
  return finished(kind, state);
}

// One thread for each row. The block that ends last makes one number of those of all blocks, in their order.
__global__ void rows_kernel(const __grid_constant__ PairArguments p, const PairChunk chunk, const Part* parts,
                            RowLoss kind, double divisor, const RowOutputs out) {
  double* shared = shared_memory<double>();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  double loss = 0.0, most = 0.0;
  if (i < p.N) {
    RowTerms row{{}, double{nanf("")}, -double{kInfinity}, 1.0};
    for (int f = 0; f < p.fold_count; ++f) {
      const bool cols = p.folds[f].cols;
      const Part* from = parts + (cols ? int64_t{chunk.tiles_across()} * chunk.rows : 0);
      const float value = value_of(p.folds[f].kind, from, cols ? chunk.tiles_down() : chunk.tiles_across(),
                                   cols ? chunk.cols : chunk.rows, i);
      out.values[f * p.N + i] = value;
      row.folds[f] = double{value};
    }
    const int64_t j = p.target[i], place = j < 0 ? -1 : place_of(chunk, i, j);
    if (place >= 0) row.target = double{logit_of(p, p.sets[0], chunk.dots[place], i, j)};
    const RowSlopes slopes = row_loss(kind, row);
    loss = slopes.loss;
    for (int f = 0; f < p.fold_count; ++f) {
      const double slope = slopes.folds[f] / divisor;
      out.slopes[f * p.N + i] = static_cast<float>(slope);
      most += fabs(slope);
    }
    out.slopes[p.fold_count * p.N + i] = static_cast<float>(slopes.target / divisor);
    most += fabs(slopes.target / divisor);
  }
  loss = fold_block(loss, shared, [](double a, double b) { return a + b; });
  most = fold_block(most, shared, [](double a, double b) { return larger(a, b); });
  if (threadIdx.x != 0) return;
  out.sums[2 * blockIdx.x] = loss, out.sums[2 * blockIdx.x + 1] = most;
  __threadfence();
  if (atomicAdd(out.ticket, 1) != static_cast<int32_t>(gridDim.x) - 1) return;
  __threadfence();
  const volatile double* sums = out.sums;
  loss = most = 0.0;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    loss += sums[2 * block], most = larger(most, sums[2 * block + 1]);
  }
  *out.loss = static_cast<float>(loss / divisor);
  if (out.norm == nullptr) return;
  const double bound = most * fabs(double{*p.sets[0].scale});
  const bool known = bound > 0.0 && bound <= double{kLargest};
  *out.norm = known ? static_cast<float>(exp2(fmin(fmax(floor(14.0 - log2(bound)), -100.0), 100.0))) : 1.0f;
}

// The sum of the parts that begin at `from`, by one block.
__device__ void add_up(const float* from, int64_t size, float factor, float* total) {
  double sum = 0.0;
  for (int64_t at = threadIdx.x; at < size; at += kThreads) sum += double{from[at]};
  sum = fold_block(sum, shared_memory<double>(), [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) *total = static_cast<float>(sum * double{factor});
}

// Gradients of one matrix: those of rows, or of columns.
struct Leaving {
  const float* gradient;   // (size, D)
  const float* residuals;  // of the first tile, or null
  const int64_t* partner;  // or null for the item itself
  const void *rows, *other;
  const float *shift, *factor, *other_factor;  // null where rows count as they are
  void* to;
  int64_t size, others, tiles;
};

// By one warp.
template <class T>
__device__ void leave(const Leaving& side, int64_t row, int64_t D, float down_by, float upstream) {
  const int lane = threadIdx.x % kWarp;
  double sum = 0.0;
  int64_t partner = -1;
  if (side.residuals != nullptr) {
    partner = side.partner != nullptr ? side.partner[row] : row;
    if (partner >= side.others) partner = -1;
    for (int64_t t = 0; t < side.tiles; ++t) sum += double{side.residuals[t * side.size + row]};
    // Residuals are of weights by unit rows.
    if (side.factor != nullptr && partner >= 0) sum *= double{side.factor[row]} * side.other_factor[partner];
  }
  const float residual = static_cast<float>(sum);
  const float* from = side.gradient + row * D;
  const T* own = static_cast<const T*>(side.rows) + row * D;
  const T* mate = static_cast<const T*>(side.other) + (partner < 0 ? 0 : partner) * D;
  T* to = static_cast<T*>(side.to) + row * D;
  const auto value_at = [&](int64_t at) {
    const float value = from[at] * down_by;
    return partner < 0 ? value : fmaf(residual, to_float(mate[at]), value);
  };
  float along = 0.0f, factor = 0.0f, shift = 1.0f;
  if (side.shift != nullptr) {
    factor = side.factor[row], shift = side.shift[row];
    bool any = false;
    for (int64_t at = lane; at < D; at += kWarp) {
      const float value = value_at(at);
      any |= value != 0.0f;
      along = fmaf(value, factor * to_float(own[at]), along);
    }
    along = fold_warp(along, [](float a, float b) { return a + b; });
    // A row that nothing depends on has no gradient, whatever it holds.
    if (!__any_sync(kFullWarp, any)) along = factor = 0.0f, shift = 1.0f;
  }
  const bool across = factor != 0.0f;
  for (int64_t at = lane; at < D; at += kWarp) {
    const float value = value_at(at);
    to[at] = from_float<T>(upstream * shift * (across ? fmaf(-along, factor * to_float(own[at]), value) : value));
  }
}

// One block for each sum, then one warp for each row of x, then for each of y.
template <class T>
__global__ void finish_kernel(const Leaving x, const Leaving y, int64_t D, const float* norm, const float* factor,
                              const float* parts, int64_t first, int64_t second, int sums, int64_t size,
                              const float* scale, float* totals) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < sums) {
    const float by_scale = block == 0 && scale != nullptr ? -*scale * *scale : 1.0f;
    add_up(parts + (block == 0 ? first : second), size, by_scale * *factor, totals + block);
    return;
  }
  const int64_t row = int64_t{block - sums} * kWarps + threadIdx.x / kWarp;
  const float down_by = norm == nullptr ? 1.0f : 1.0f / *norm;
  if (row < x.size) {
    leave<T>(x, row, D, down_by, *factor);
  } else if (row < x.size + y.size) {
    leave<T>(y, row - x.size, D, down_by, *factor);
  }
}

}  // namespace

void similarity_loss_prepare(Stream stream, const float* given_scale, double scale_number, bool inverted,
                             const float* given_bias, double bias_number, int64_t N, float* scale, float* row_bias,
                             int64_t* target, int32_t* ticket, Input x, Input y, int64_t M, int64_t D, Output x_rows,
                             Output y_rows, float* lengths) {
  const bool unit = lengths != nullptr;
  const UnitRows of_x{x.data, x_rows.data, lengths, unit ? lengths + N : nullptr, N};
  const UnitRows of_y{y.data, y_rows.data, unit ? lengths + 2 * N : nullptr, unit ? lengths + 2 * N + M : nullptr, M};
  const int64_t blocks = unit ? ceil_divide(N + M, kWarps) : ceil_divide(N > 0 ? N : 1, kThreads);
  with_type(x.dtype, [&](auto type) {
    launch(prepare_kernel<decltype(type)>, blocks, kThreads, 0, stream, given_scale, static_cast<float>(scale_number),
           inverted, given_bias, static_cast<float>(bias_number), N, scale, row_bias, target, ticket, of_x, of_y, D);
  });
}

void similarity_loss_multiply(Stream stream, float* dots, int64_t N, int64_t M, int64_t pitch, const float* row_factor,
                              const float* col_factor) {
  if (pitch % kLoad != 0) throw std::invalid_argument("pitch: it must be a multiple of 4 columns");
  launch(multiply_kernel, ceil_divide(N * pitch / kLoad, kThreads), kThreads, 0, stream, dots, N, M, pitch, row_factor,
         col_factor);
}

void similarity_loss_rows(Stream stream, const float* dots, Integers chunk_numbers, Arrays pair_data, Integers spec,
                          const float* scale, const float* row_bias, const float* col_bias, const int64_t* target,
                          int64_t N, int64_t M, const float* parts, int64_t kind, double divisor, int32_t* ticket,
                          double* sums, float* values, float* slopes, float* loss, float* norm) {
  const PairArguments p = pairs_of(pair_data, spec, scale, row_bias, col_bias, target, N, M);
  const PairChunk chunk = chunk_of(dots, nullptr, chunk_numbers);
  const auto loss_kind = static_cast<RowLoss>(kind);
  if (loss_kind != RowLoss::softmax && loss_kind != RowLoss::softmax_both && loss_kind != RowLoss::sigmoid) {
    throw std::invalid_argument("kind: it must be one with a single set");
  }
  for (int f = 0; f < p.fold_count; ++f) {
    if (p.folds[f].cols && N != M)
      throw std::invalid_argument("folds: those of columns need as many as there are rows");
  }
  if (chunk.itself || chunk.rows != N || chunk.cols != M || p.fold_count > kRowFolds || target == nullptr) {
    throw std::invalid_argument("chunk: it must be the whole matrix, and rows must have targets");
  }
  launch(rows_kernel, ceil_divide(N, kThreads), kThreads, sizeof(double) * kThreads, stream, p, chunk,
         reinterpret_cast<const Part*>(parts), loss_kind, divisor,
         RowOutputs{ticket, sums, values, slopes, loss, norm});
}

void similarity_loss_finish(Stream stream, const float* dx, const float* dy, Input x, Input y, const float* lengths,
                            int64_t N, int64_t M, int64_t D, const float* norm, const float* factor, const float* parts,
                            int64_t row_residuals, int64_t col_residuals, int64_t across, int64_t down,
                            const int64_t* target, const int64_t* partner, Output x_gradient, Output y_gradient,
                            Integers begins, const float* scale, float* totals) {
  if (begins.size > 2) throw std::invalid_argument("begins: there must be at most two sums");
  const auto residuals = [&](int64_t begin) { return begin < 0 ? nullptr : parts + begin; };
  const auto length = [&](int64_t begin) { return lengths == nullptr ? nullptr : lengths + begin; };
  const float *x_factor = length(N), *y_factor = length(2 * N + M);
  const Leaving of_x{dx,
                     residuals(row_residuals),
                     target,
                     x.data,
                     y.data,
                     length(0),
                     x_factor,
                     y_factor,
                     x_gradient.data,
                     dx == nullptr ? 0 : N,
                     M,
                     across};
  const Leaving of_y{dy,
                     residuals(col_residuals),
                     partner,
                     y.data,
                     x.data,
                     length(2 * N),
                     y_factor,
                     x_factor,
                     y_gradient.data,
                     dy == nullptr ? 0 : M,
                     N,
                     down};
  const int sums = static_cast<int>(begins.size);
  const int64_t blocks = sums + ceil_divide(of_x.size + of_y.size, kWarps);
  const int64_t first = sums > 0 ? begins.data[0] : 0, second = sums > 1 ? begins.data[1] : 0;
  with_type(x.dtype, [&](auto type) {
    launch(finish_kernel<decltype(type)>, blocks, kThreads, sizeof(double) * kThreads, stream, of_x, of_y, D, norm,
           factor, parts, first, second, sums, across * N, scale, totals);
  });
}

}  // namespace contrastive_ops
