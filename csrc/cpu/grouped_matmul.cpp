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
    const OutputBlock<T> block_out{out + row * p.F + j, p.F, rows, columns, bias, nullptr, stream};
    products[thread].run(a, b, p.D, block_out, size);
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

// In how many parts the rows of each group are summed where there are too few blocks for many cores, as in the gradient
// of a router's weight. Threads have no say in it, because the order of a sum is that of its parts.
template <class C>
int64_t parts_of_rows(const RowGroups& rows, int64_t D, int64_t F, int64_t step) {
  constexpr int64_t kEnoughBlocks = 64;
  const int64_t blocks = rows.groups * ceil_divide(D, kFewestRows) * ceil_divide(F, kPackedCols);
  int64_t longest = 0;
  for (int64_t e = 0; e < rows.groups; ++e) longest = maximum(longest, rows.offsets[e + 1] - rows.offsets[e]);
  if (blocks == 0 || 2 * blocks > kEnoughBlocks) return 1;
  return maximum<int64_t>(1, minimum(ceil_divide(kEnoughBlocks, blocks), ceil_divide(longest, step)));
}

template <class C, class T>
class OuterSums {
  using A = typename C::Acc;
  using Product = BlockProduct<C, T>;

 public:
  OuterSums(const GroupedOuter& p, const Parallel& parallel)
      : p_(p),
        D_(p.db ? p.D : 0),
        parts_(parts_of_rows<C>(p.rows, D_, p.F, Product::kDepthStep)),
        size_(block_size(p.F, parallel.threads,
                         [this](int64_t block_rows) { return p_.rows.groups * parts_ * blocks_of(block_rows); })),
        row_blocks_(blocks_of(size_.rows)),
        col_blocks_(ceil_divide(p.F, size_.cols)),
        numbers_(round_up((D_ + 1) * p.F, kLanes<A>)),
        products_(new Product[parallel.threads]) {}

  void run(const Parallel& parallel) {
    const int64_t blocks = p_.rows.groups * parts_ * row_blocks_ * col_blocks_;
    if (parts_ == 1) {
      const auto cost = [this](int64_t index) { return cost_of_block(block(index)); };
      auto task = [this](int64_t index, int thread) { write(block(index), thread); };
      return run_longest_first(parallel, blocks, cost, task);
    }
    sums_.allocate(p_.rows.groups * parts_ * numbers_);
    const int first[] = {0};
    const int64_t ranges = ceil_divide((D_ + 1) * p_.F, kRange);
    const Stage stages[] = {{blocks}, {p_.rows.groups * ranges, first, 1}};
    auto task = [&](int64_t index, int thread) {
      if (index < blocks) return sum(block(index), thread);
      add_up((index - blocks) / ranges, (index - blocks) % ranges * kRange);
    };
    run_stages(parallel, 2, stages, task);
  }

 private:
  static constexpr int64_t kRange = 2048;  // outputs of a task that adds up parts
  struct Block {
    int64_t group, part, i, j, rows, cols, begin, end;  // outputs, and the rows of the group's part
  };

  // Sums of g alone are those of a product without rows.
  int64_t blocks_of(int64_t block_rows) const { return maximum<int64_t>(ceil_divide(D_, block_rows), 1); }
  Block block(int64_t index) const {
    const int64_t j = index % col_blocks_ * size_.cols, i = index / col_blocks_ % row_blocks_ * size_.rows;
    const int64_t part = index / (col_blocks_ * row_blocks_) % parts_, e = index / (col_blocks_ * row_blocks_ * parts_);
    const int64_t first = p_.rows.offsets[e], last = p_.rows.offsets[e + 1];
    const int64_t step = parts_ == 1 ? last - first : round_up(ceil_divide(last - first, parts_), Product::kDepthStep);
    const int64_t begin = minimum(first + part * step, last), end = minimum(begin + step, last);
    return {e, part, i, j, minimum(size_.rows, D_ - i), minimum(size_.cols, p_.F - j), begin, end};
  }
  int64_t cost_of_block(const Block& b) const {
    return cost_of(b.rows, b.cols, b.end - b.begin, b.j == 0 ? b.rows * p_.F : 0);
  }

  void write(const Block& b, int thread) {
    T* to = p_.db ? static_cast<T*>(p_.db) + (b.group * D_ + b.i) * p_.F + b.j : nullptr;
    T* bias = p_.dbias && b.i == 0 ? static_cast<T*>(p_.dbias) + b.group * p_.F + b.j : nullptr;
    multiply(b, OutputBlock<T>{to, p_.F, b.rows, b.cols, nullptr, bias, streams<T>(p_.rows.groups * D_ * p_.F)},
             thread);
  }
  // The sums of the bias come behind those of the matrix.
  void sum(const Block& b, int thread) {
    A* own = sums_.get() + (b.group * parts_ + b.part) * numbers_;
    A* bias = p_.dbias && b.i == 0 ? own + D_ * p_.F + b.j : nullptr;
    multiply(b, OutputBlock<A>{own + b.i * p_.F + b.j, p_.F, b.rows, b.cols, nullptr, bias, false}, thread);
  }
  template <class Out>
  void multiply(const Block& b, const OutputBlock<Out>& out, int thread) {
    const Operand<T> a = lanes_are_columns<T>(p_.a).from(b.i, b.begin);
    products_[thread].run(a, lanes_are_columns<T>(p_.g).from(b.j, b.begin), b.end - b.begin, out, size_);
  }

  // A range of a group's sums over its parts, in order.
  void add_up(int64_t group, int64_t from) {
    alignas(64) A total[kRange];
    const int64_t outputs = D_ * p_.F, end = minimum(from + kRange, p_.dbias ? outputs + p_.F : outputs);
    const A* sums = sums_.get() + group * parts_ * numbers_;
    for (int64_t k = from; k < end; k += kLanes<A>) {
      Vec<A> all = load(sums + k);
      for (int64_t part = 1; part < parts_; ++part) all += load(sums + part * numbers_ + k);
      store(total + (k - from), all);
    }
    const int64_t of_matrix = maximum<int64_t>(0, minimum(end, outputs) - from);
    if (of_matrix) narrow(total, of_matrix, static_cast<T*>(p_.db) + group * outputs + from);
    if (end <= outputs) return;
    const int64_t begin = maximum(from, outputs);
    narrow(total + (begin - from), end - begin, static_cast<T*>(p_.dbias) + group * p_.F + (begin - outputs));
  }

  const GroupedOuter& p_;
  const int64_t D_, parts_;
  const BlockSize size_;
  const int64_t row_blocks_, col_blocks_, numbers_;
  const std::unique_ptr<Product[]> products_;
  Buffer<A> sums_;  // (groups, parts, numbers)
};

template <class C, class T>
void grouped_outer(const GroupedOuter& p, const Parallel& parallel) {
  OuterSums<C, T>(p, parallel).run(parallel);
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
