// How a search is cut into tasks: who takes which rows against which columns, and when thresholds are known.
//
// Where rows alone keep all threads busy, each task sweeps all columns, and what it has found bounds what may follow.
// Else several tasks share a row. None would know from the others what is too small, and each would list the k best of
// its own columns, most of them in vain; so the columns come in passes. The first one takes a few columns from
// everywhere, each later one the rest up to four times as many columns as there were before, from the threshold that
// the k-th best of those has set.
//
// Cuts depend on the number of threads. Lists do not: a threshold is a number that k columns reach, and equal ones
// stay.
#pragma once

#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Columns of a corpus are taken in blocks, of which 1 in 4^(passes - 1) belongs to the first pass.
class BlockOrder {
 public:
  BlockOrder() = default;
  BlockOrder(int64_t blocks, int passes) : blocks_(blocks), first_stride_(int64_t{1} << 2 * (passes - 1)) {}
  // Blocks of all passes up to the one whose stride this is.
  int64_t up_to(int64_t stride) const { return (blocks_ + stride - 1) / stride; }
  int64_t after_pass(int pass) const { return up_to(first_stride_ >> 2 * pass); }
  // The block that is the n-th to be taken; they ascend within a pass.
  int64_t operator()(int64_t n) const {
    for (int64_t stride = 1; stride < first_stride_; stride *= 4) {
      const int64_t before = up_to(4 * stride);
      if (n >= before) return stride * ((n - before) / 3 * 4 + (n - before) % 3 + 1);
    }
    return first_stride_ * n;
  }

 private:
  int64_t blocks_ = 0, first_stride_ = 1;
};

// Some blocks of columns, in `parts`, each against `rows` rows at a time.
struct TopKPass {
  int64_t from, to;  // places in the order of blocks
  int64_t rows, chunks, parts;
  int64_t first_part;  // number of parts of earlier passes
  int64_t tasks() const { return chunks * parts; }
  int64_t blocks_of_a_part() const { return (to - from + parts - 1) / parts; }
};

struct TopKSizes {
  int64_t rows, columns, k, threads;
  int64_t row_step, block;    // rows of a panel, columns of a block
  int64_t most_rows;          // of a task, for the memory of its lists
  int64_t bytes_of_part_row;  // what a part keeps of a row
};

class TopKCuts {
 public:
  static constexpr int kMostPasses = 5;

  explicit TopKCuts(const TopKSizes& sizes) : s_(sizes), blocks_((sizes.columns + sizes.block - 1) / sizes.block) {
    by_rows();
    int64_t best = time();
    // Lists of parts are gathered, and a few more columns than before are listed: some hundredths.
    for (int passes = 2; passes <= kMostPasses && s_.threads > 1 && enough_columns(passes); ++passes) {
      const TopKCuts found(sizes, passes);
      const int64_t took = found.time() + found.time() / 16;
      if (took < best) *this = found, best = took;
    }
  }

  int passes() const { return passes_; }
  const TopKPass& pass(int n) const { return pass_[n]; }
  const BlockOrder& order() const { return order_; }
  int64_t parts() const { return pass_[passes_ - 1].first_part + pass_[passes_ - 1].parts; }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int n = 0; n < passes_; ++n) most = maximum(most, pass_[n].rows);
    return most;
  }

 private:
  // To pack a block takes as long as this many rows take to be multiplied by it.
  static constexpr int64_t kPackRows = 8;
  static constexpr int64_t kPartBytes = int64_t{8} << 20, kPartBytesOfAThread = int64_t{512} << 10;
  static constexpr int64_t kFewestBlocks = 2, kTasksOfAThread = 4;
  // Columns of a part are numbered in 32 bits.
  static constexpr int64_t kMostColumns = int64_t{1} << 30;

  TopKCuts(const TopKSizes& sizes, int passes)
      : s_(sizes), blocks_((sizes.columns + sizes.block - 1) / sizes.block), passes_(passes), order_(blocks_, passes) {
    int64_t left = maximum<int64_t>(
        (kPartBytes + s_.threads * kPartBytesOfAThread) / maximum<int64_t>(s_.rows * s_.bytes_of_part_row, 1), passes);
    int64_t from = 0, parts = 0;
    for (int n = 0; n < passes; ++n) {
      const int64_t to = order_.after_pass(n);
      pass_[n] = {from, to, 0, 0, 1, parts};
      shape(pass_[n], n == 0, n + 1 == passes ? left : maximum<int64_t>(left / (passes - n), 1));
      left = maximum<int64_t>(left - pass_[n].parts, 1);
      parts += pass_[n].parts;
      from = to;
    }
  }

  bool enough_columns(int passes) const {
    return (s_.columns >> 2 * (passes - 1)) >= maximum<int64_t>(2 * s_.k, 4 * s_.block);
  }

  void by_rows() {
    passes_ = 1;
    order_ = BlockOrder(blocks_, 1);
    int64_t chunks = maximum<int64_t>((s_.rows + s_.most_rows - 1) / s_.most_rows, 1);
    if (chunks > 1 || s_.threads > 1) chunks = round_up(chunks, s_.threads);
    pass_[0] = {0, blocks_, rows_of(chunks), 0, s_.columns / kMostColumns + 1, 0};
    pass_[0].chunks = chunks_of(pass_[0].rows);
  }

  // The first pass sets thresholds, for which a row should be in one part of it; later ones pack for many rows.
  void shape(TopKPass& pass, bool first, int64_t most_parts) const {
    const int64_t widest =
        first ? s_.threads : (s_.rows + s_.most_rows / 2 - 1) / maximum<int64_t>(s_.most_rows / 2, 1);
    pass.rows = minimum(rows_of(maximum<int64_t>(widest, 1)), s_.most_rows);
    pass.chunks = chunks_of(pass.rows);
    const int64_t fewest = s_.columns / kMostColumns + 1, blocks = pass.to - pass.from;
    const int64_t most = maximum<int64_t>(minimum(most_parts, blocks / kFewestBlocks), 1);
    const auto part_time = [&](int64_t parts) { return time_of(pass, parts); };
    pass.parts = 1;
    for (int64_t parts = 2; !first && parts <= most && pass.chunks * (parts - 1) < kTasksOfAThread * s_.threads;
         ++parts) {
      if (part_time(parts) < part_time(pass.parts)) pass.parts = parts;
    }
    pass.parts = maximum(pass.parts, fewest);
  }

  int64_t rows_of(int64_t chunks) const {
    return maximum<int64_t>(round_up((s_.rows + chunks - 1) / chunks, s_.row_step), s_.row_step);
  }
  int64_t chunks_of(int64_t rows) const { return maximum<int64_t>((s_.rows + rows - 1) / rows, 1); }

  // In products of a row and a block.
  int64_t time_of(const TopKPass& pass, int64_t parts) const {
    const int64_t tasks = pass.chunks * parts, rounds = (tasks + s_.threads - 1) / s_.threads;
    return rounds * (pass.rows + kPackRows) * ((pass.to - pass.from + parts - 1) / parts);
  }
  int64_t time() const {
    int64_t sum = 0;
    for (int n = 0; n < passes_; ++n) sum += time_of(pass_[n], pass_[n].parts);
    return sum;
  }

  TopKSizes s_;
  int64_t blocks_;
  int passes_ = 1;
  BlockOrder order_;
  TopKPass pass_[kMostPasses];
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
