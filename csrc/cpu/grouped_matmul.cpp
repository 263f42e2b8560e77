// grouped_matmul on the CPU: rows times the matrix of their group, and sums of outer products over each group.
//
// Compiled once per SIMD level. Both products are cut into blocks of
// at most kTaskRows x kTaskCols outputs, one task each, and a block is a sum over steps of the depth of packed panels
// (grouped_block.h). Every sum runs along the depth in the same steps wherever its output lies, so neither the
// number of threads nor the rows around it change a bit.
#include "../grouped_matmul.h"

#include "grouped_activation.h"
#include "grouped_block.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Most outputs of a task, where packing either side is cheap, and as few as there may be where threads have no work
// else.
constexpr int64_t kTaskRows = 512, kTaskCols = 2048, kFewestRows = 64;
static_assert(2 * kUnits >= kTaskRows, "of one row, a step of the depth or all lanes of a side are packed");
// More threads than so many have blocks of fewer columns, for the memory of them all.
constexpr int kFewThreads = 8;
constexpr int64_t kTaskColsOfMany = 512;
// Outputs from this size on are not kept in a cache on their way to memory.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

template <class T>
bool streams(int64_t outputs) {
  return outputs >= kStreamedBytes / static_cast<int64_t>(sizeof(T));
}

// Outputs of a task: fewer where there would be too few tasks for all threads, the longer side first, because each is
// packed once for every block along the other. Results do not depend on it.
template <class CountRowBlocks>
BlockSize block_size(int64_t columns, int threads, CountRowBlocks row_blocks) {
  BlockSize size{kTaskRows, threads > kFewThreads ? kTaskColsOfMany : kTaskCols};
  while (row_blocks(size.rows) * ceil_divide(columns, size.cols) < 4 * threads) {
    const bool few_rows = size.rows <= kFewestRows, few_cols = size.cols <= kPackedCols;
    if (few_rows && few_cols) break;
    (few_rows || (!few_cols && minimum(size.cols, columns) >= size.rows) ? size.cols : size.rows) /= 2;
  }
  return size;
}

template <class C, class T>
void grouped_forward(const GroupedForward& p, const Parallel& parallel) {
  const int64_t* offsets = p.rows.offsets;
  const int64_t groups = p.rows.groups;
  T* const out = static_cast<T*>(p.out);

  // Blocks of rows are numbered through the groups: group e has first_block[e] to first_block[e + 1].
  Buffer<int64_t> first_block(groups + 1);
  first_block.get()[0] = 0;
  const BlockSize size = block_size(p.F, parallel.threads, [&](int64_t block_rows) {
    for (int64_t e = 0; e < groups; ++e) {
      first_block.get()[e + 1] = first_block.get()[e] + ceil_divide(offsets[e + 1] - offsets[e], block_rows);
    }
    return first_block.get()[groups];
  });
  const int64_t row_blocks = first_block.get()[groups];
  const int64_t task_cols = size.cols, col_blocks = ceil_divide(p.F, task_cols);

  const std::unique_ptr<BlockProduct<C, T>[]> products(new BlockProduct<C, T>[parallel.threads]);
  const bool stream = streams<T>(p.rows.rows * p.F);
  auto task = [&](int64_t index, int thread) {
    const int64_t row_block = index / col_blocks, j = index % col_blocks * task_cols;
    int64_t e = 0;  // the last group that begins at this block or before it
    for (int64_t end = groups; end - e > 1;) {
      const int64_t middle = e + (end - e) / 2;
      (first_block.get()[middle] <= row_block ? e : end) = middle;
    }
    const int64_t part = row_block - first_block.get()[e], parts = first_block.get()[e + 1] - first_block.get()[e];
    const int64_t rows = offsets[e + 1] - offsets[e], part_rows = round_up(ceil_divide(rows, parts), kRows<C>);
    const int64_t begin = minimum(part * part_rows, rows), end = minimum(begin + part_rows, rows);
    const Operand<T> a = lanes_are_rows<T>(p.a).from(offsets[e] + begin, 0);
    Operand<T> b = lanes_are_columns<T>(p.b).from(j, 0);
    b.data += e * p.b_group_stride;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + e * p.F + j : nullptr;
    T* to = out + (offsets[e] + begin) * p.F + j;
    products[thread].run(a, b, p.D, {to, p.F, end - begin, minimum(task_cols, p.F - j), bias, nullptr, stream}, size);
  };
  run_parallel(parallel.run, row_blocks * col_blocks, task);

  const int64_t before = ceil_divide(offsets[0], kTaskRows), after = p.rows.rows - offsets[groups];
  auto clear = [&](int64_t index, int) {
    const bool tail = index >= before;
    const int64_t begin = tail ? offsets[groups] + (index - before) * kTaskRows : index * kTaskRows;
    const int64_t end = minimum(begin + kTaskRows, tail ? p.rows.rows : offsets[0]);
    memset(out + begin * p.F, 0, static_cast<size_t>((end - begin) * p.F) * sizeof(T));
  };
  run_parallel(parallel.run, before + ceil_divide(after, kTaskRows), clear);
}

template <class C, class T>
void grouped_outer(const GroupedOuter& p, const Parallel& parallel) {
  const int64_t* offsets = p.rows.offsets;
  const int64_t D = p.db ? p.D : 0;
  // Sums of g alone are those of a product without rows.
  const auto blocks_of = [&](int64_t block_rows) { return maximum<int64_t>(ceil_divide(D, block_rows), 1); };
  const BlockSize size =
      block_size(p.F, parallel.threads, [&](int64_t block_rows) { return p.rows.groups * blocks_of(block_rows); });
  const int64_t row_blocks = blocks_of(size.rows), task_cols = size.cols, col_blocks = ceil_divide(p.F, task_cols);

  const std::unique_ptr<BlockProduct<C, T>[]> products(new BlockProduct<C, T>[parallel.threads]);
  const bool stream = streams<T>(p.rows.groups * p.D * p.F);
  auto task = [&](int64_t index, int thread) {
    const int64_t e = index / (row_blocks * col_blocks), row_block = index / col_blocks % row_blocks;
    const int64_t i = row_block * size.rows, j = index % col_blocks * task_cols;
    const Operand<T> a = lanes_are_columns<T>(p.a).from(i, offsets[e]);
    const Operand<T> g = lanes_are_columns<T>(p.g).from(j, offsets[e]);
    T* to = p.db ? static_cast<T*>(p.db) + (e * p.D + i) * p.F + j : nullptr;
    T* sums = p.dbias && row_block == 0 ? static_cast<T*>(p.dbias) + e * p.F + j : nullptr;
    products[thread].run(a, g, offsets[e + 1] - offsets[e],
                         {to, p.F, minimum(size.rows, D - i), minimum(task_cols, p.F - j), nullptr, sums, stream},
                         size);
  };
  run_parallel(parallel.run, p.rows.groups * row_blocks * col_blocks, task);
}

void grouped_forward_any(const GroupedForward& p, const Parallel& parallel) {
  for_type(
      p.rows.dtype, [&](auto c, auto s) { grouped_forward<decltype(c), decltype(s)>(p, parallel); },
      [&] { LEVEL_BELOW::grouped_matmul().forward(p, parallel); });
}
void grouped_outer_any(const GroupedOuter& p, const Parallel& parallel) {
  for_type(
      p.rows.dtype, [&](auto c, auto s) { grouped_outer<decltype(c), decltype(s)>(p, parallel); },
      [&] { LEVEL_BELOW::grouped_matmul().outer(p, parallel); });
}
void activate_any(const ActivatedRows& p, const Parallel& parallel) {
  for_type(
      p.dtype, [&](auto c, auto s) { activate_rows<typename decltype(c)::Acc, decltype(s)>(p, parallel); },
      [&] { LEVEL_BELOW::grouped_matmul().activate(p, parallel); });
}
void activate_backward_any(const ActivatedRows& p, const Parallel& parallel) {
  for_type(
      p.dtype, [&](auto c, auto s) { activate_rows_backward<typename decltype(c)::Acc, decltype(s)>(p, parallel); },
      [&] { LEVEL_BELOW::grouped_matmul().activate_backward(p, parallel); });
}

}  // namespace

GroupedMatmul grouped_matmul() { return {grouped_forward_any, grouped_outer_any, activate_any, activate_backward_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
