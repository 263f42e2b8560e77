// grouped_matmul on the CPU: rows times the matrix of their group, and sums of outer products over each group.
//
// Compiled once per SIMD level. Both products are cut into blocks of
// at most kTaskRows x kTaskCols outputs, one task each, and a block is a sum over steps of the depth of packed panels
// (grouped_block.h). Every sum runs along the depth in the same steps wherever its output lies, so neither the
// number of threads nor the rows around it change a bit.
#include "../grouped_matmul.h"

#include <algorithm>

#include "grouped_activation.h"
#include "grouped_block.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Most outputs of a task, where packing either side is cheap, and as few as there may be where threads have no work
// else. Rows are an eighth more than a power of two: groups are seldom of one length, and those of a little more than
// 512 rows would be cut in two, or in three of 256, whose columns are packed for each.
constexpr int64_t kTaskRows = 576, kTaskCols = 2048, kFewestRows = 72;
static_assert(2 * kUnits >= kTaskRows, "of one row, a step of the depth or all lanes of a side are packed");
// More threads than so many have blocks of fewer columns, for the memory of them all.
constexpr int kFewThreads = 8;
constexpr int64_t kTaskColsOfMany = 512;
// Tasks of a thread, at least: the longest come first, so that the last ones are short.
constexpr int64_t kTasksOfThread = 3;
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
  while (row_blocks(size.rows) * ceil_divide(columns, size.cols) < kTasksOfThread * threads) {
    const bool few_rows = size.rows <= kFewestRows, few_cols = size.cols <= kPackedCols;
    if (few_rows && few_cols) break;
    (few_rows || (!few_cols && minimum(size.cols, columns) >= size.rows) ? size.cols : size.rows) /= 2;
  }
  return size;
}

// What a task takes, in products: packing a number takes as long as some 20 of them, and the first touch of an output
// as 40, which is that of whole rows, because a page holds all their columns.
int64_t cost_of(int64_t rows, int64_t columns, int64_t depth, int64_t touched) {
  return (rows * columns + 20 * (rows + columns)) * depth + 40 * touched;
}

// Runs tasks of different lengths, the longest first; who works alone keeps to their order, in which neighbours share
// rows.
template <class Cost, class Task>
void run_longest_first(const Parallel& parallel, int64_t count, const Cost& cost, Task& task) {
  if (parallel.threads == 1 || count <= 1) return run_parallel(parallel.run, count, task);
  struct Turn {
    int64_t cost, index;
  };
  Buffer<Turn> turns(count);
  for (int64_t index = 0; index < count; ++index) turns.get()[index] = {cost(index), index};
  std::sort(turns.get(), turns.get() + count,
            [](const Turn& a, const Turn& b) { return a.cost != b.cost ? a.cost > b.cost : a.index < b.index; });
  auto in_turn = [&](int64_t turn, int thread) { task(turns.get()[turn].index, thread); };
  run_parallel(parallel.run, count, in_turn);
}

// Blocks of rows, numbered through the groups.
class RowBlocks {
 public:
  struct Block {
    int64_t group, begin, end;  // rows within the group
  };

  RowBlocks(const RowGroups& rows, int64_t tile) : rows_(rows), tile_(tile), first_(rows.groups + 1) {
    first_.get()[0] = 0;
  }
  // Cuts anew; returns how many there are.
  int64_t cut(int64_t block_rows) {
    for (int64_t e = 0; e < rows_.groups; ++e) first_.get()[e + 1] = first_.get()[e] + ceil_divide(size(e), block_rows);
    return first_.get()[rows_.groups];
  }
  // Of whole tiles but for the last of a group.
  Block block(int64_t index) const {
    int64_t e = 0;  // the last group that begins at this block or before it
    for (int64_t end = rows_.groups; end - e > 1;) {
      const int64_t middle = e + (end - e) / 2;
      (first_.get()[middle] <= index ? e : end) = middle;
    }
    const int64_t part = index - first_.get()[e], parts = first_.get()[e + 1] - first_.get()[e];
    const int64_t part_rows = round_up(ceil_divide(size(e), parts), tile_), begin = minimum(part * part_rows, size(e));
    return {e, begin, minimum(begin + part_rows, size(e))};
  }

 private:
  int64_t size(int64_t e) const { return rows_.offsets[e + 1] - rows_.offsets[e]; }

  const RowGroups& rows_;
  const int64_t tile_;
  Buffer<int64_t> first_;  // group e has the blocks from first[e] to first[e + 1]
};

template <class C, class T>
void grouped_forward(const GroupedForward& p, const Parallel& parallel) {
  const int64_t* offsets = p.rows.offsets;
  const int64_t groups = p.rows.groups;
  T* const out = static_cast<T*>(p.out);

  RowBlocks blocks(p.rows, kRows<C>);
  const BlockSize size = block_size(p.F, parallel.threads, [&](int64_t block_rows) { return blocks.cut(block_rows); });
  const int64_t row_blocks = blocks.cut(size.rows), task_cols = size.cols, col_blocks = ceil_divide(p.F, task_cols);

  const std::unique_ptr<BlockProduct<C, T>[]> products(new BlockProduct<C, T>[parallel.threads]);
  const bool stream = streams<T>(p.rows.rows * p.F);
  const auto cost = [&](int64_t index) {
    const RowBlocks::Block block = blocks.block(index / col_blocks);
    const int64_t rows = block.end - block.begin, j = index % col_blocks * task_cols;
    return cost_of(rows, minimum(task_cols, p.F - j), p.D, j == 0 ? rows * p.F : 0);
  };
  auto task = [&](int64_t index, int thread) {
    const RowBlocks::Block block = blocks.block(index / col_blocks);
    const int64_t e = block.group, row = offsets[e] + block.begin, j = index % col_blocks * task_cols;
    const Operand<T> a = lanes_are_rows<T>(p.a).from(row, 0);
    Operand<T> b = lanes_are_columns<T>(p.b).from(j, 0);
    b.data += e * p.b_group_stride;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + e * p.F + j : nullptr;
    const int64_t rows = block.end - block.begin, columns = minimum(task_cols, p.F - j);
    products[thread].run(a, b, p.D, {out + row * p.F + j, p.F, rows, columns, bias, nullptr, stream}, size);
  };
  run_longest_first(parallel, row_blocks * col_blocks, cost, task);

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
  const auto cost = [&](int64_t index) {
    const int64_t e = index / (row_blocks * col_blocks), i = index / col_blocks % row_blocks * size.rows;
    const int64_t rows = minimum(size.rows, D - i), j = index % col_blocks * task_cols;
    return cost_of(rows, minimum(task_cols, p.F - j), offsets[e + 1] - offsets[e], j == 0 ? rows * p.F : 0);
  };
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
  run_longest_first(parallel, p.rows.groups * row_blocks * col_blocks, cost, task);
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
