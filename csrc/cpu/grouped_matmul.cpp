// grouped_matmul on the CPU: rows times the matrix of their group, and sums of outer products over each group.
//
// Compiled once per SIMD level. Both products are cut into blocks of
// at most kTaskRows x kTaskCols outputs, one task each, and a block is a sum over steps of the depth of packed panels
// (similarity_tile.h). Every sum runs along the depth in the same steps wherever its output lies, so neither the
// number of threads nor the rows around it change a bit.
#include "../grouped_matmul.h"

#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Most outputs of a task, where packing either side is cheap, and as few as there may be where threads have no work
// else.
constexpr int64_t kTaskRows = 512, kTaskCols = 2048, kFewestRows = 64;
// More threads than so many have blocks of fewer columns, for the memory of them all.
constexpr int kFewThreads = 8;
constexpr int64_t kTaskColsOfMany = 512;
// Units of depth that are packed at a time, and columns: with the rows they take half of a level-2 cache of 2 MiB.
constexpr int64_t kUnits = 512, kPackedCols = 128;
// Units of depth that are multiplied at a time: one panel of columns stays in the level-1 cache.
constexpr int64_t kTileUnits = 256;

// Outputs from this size on are not kept in a cache on their way to memory.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a row that is listed as -1 holds: as many zeros as are packed of one.
template <class T>
alignas(64) constexpr T kZeroRow[2 * kUnits] = {};
static_assert(2 * kUnits >= kTaskRows, "of one row, a step of the depth or all lanes of a side are packed");

// Rows of a source that lie anywhere.
template <class T>
struct ListedRows {
  using Element = T;
  const T* from;
  int64_t stride;
  const int64_t* list;
  INLINE const T* operator()(int64_t row) const { return list[row] < 0 ? kZeroRow<T> : from + list[row] * stride; }
};

// One side of a product: its lanes along its depth. Rows of the source are contiguous; each of them is a lane, or holds
// all lanes at one depth.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;  // from one row of the source to the next
  bool rows_are_lanes;
  const int64_t* list;  // which row of the source each one is, or null

  Operand from(int64_t lane, int64_t depth) const {
    const int64_t row = rows_are_lanes ? lane : depth, at = rows_are_lanes ? depth : lane;
    if (list) return {data + at, stride, rows_are_lanes, list + row};
    return {data + row * stride + at, stride, rows_are_lanes, nullptr};
  }
  // Calls body with the rows, as packing takes them.
  template <class Body>
  INLINE void with_rows(const Body& body) const {
    if (list) {
      body(ListedRows<T>{data, stride, list});
    } else {
      body(EvenRows<T>{data, stride});
    }
  }
};
template <class T>
Operand<T> operand(const StridedMatrix& x, bool rows_are_lanes) {
  const bool by_rows = x.col_stride == 1;
  return {static_cast<const T*>(x.data), by_rows ? x.row_stride : x.col_stride, by_rows == rows_are_lanes, x.list};
}
template <class T>
Operand<T> lanes_are_rows(const StridedMatrix& x) {
  return operand<T>(x, true);
}
template <class T>
Operand<T> lanes_are_columns(const StridedMatrix& x) {
  return operand<T>(x, false);
}

// Reads a part of an operand into the cache while another is multiplied: its rows may lie pages apart, where the
// processor does not read ahead by itself.
template <class T>
class ReadAhead {
 public:
  ReadAhead(const Operand<T>& from, int64_t lanes, int64_t depth) : from_(from) {
    const int64_t row_bytes = (from.rows_are_lanes ? depth : lanes) * static_cast<int64_t>(sizeof(T));
    lines_ = (row_bytes + kLine - 1) / kLine;
    left_ = lines_ * (from.rows_are_lanes ? lanes : depth);
  }
  int64_t left() const { return left_; }
  void fetch(int64_t count) {
    for (count = minimum(count, left_), left_ -= count; count > 0; --count) {
      if (line_ == 0) {
        from_.with_rows([&](const auto& row) { at_ = reinterpret_cast<const char*>(row(row_)); });
        ++row_;
      }
      __builtin_prefetch(at_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  Operand<T> from_;
  const char* at_ = nullptr;
  int64_t lines_, left_, row_ = 0, line_ = 0;
};

// The result of a block; row r begins at data + r * stride.
template <class T>
struct OutputBlock {
  T* data;
  int64_t stride, rows, cols;
  const T* initial;  // (cols,) what every row begins with, or null for zeros
  T* lane_sums;      // (cols,) receives the sums of the right side along the depth, or null
  bool stream;       // whether the outputs are too many to stay in a cache
};

// A whole line that is not read first and takes no place in the cache.
INLINE void stream_line(void* to, const void* from) {
#if defined(__x86_64__)
  auto* line = static_cast<__m128i*>(to);
  for (int q = 0; q < 4; ++q) _mm_stream_si128(line + q, _mm_load_si128(static_cast<const __m128i*>(from) + q));
#else
  memcpy(to, from, 64);
#endif
}
// Streamed lines become visible to other threads.
INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

struct BlockSize {
  int64_t rows, cols;
};

// Computes blocks in the memory of one thread, on cache lines of its own. C: what is multiplied, T: the type of the
// matrices.
template <class C, class T>
class alignas(64) BlockProduct {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;

  // All blocks of a thread are within the same size.
  void run(const Operand<T>& left, const Operand<T>& right, int64_t depth, const OutputBlock<T>& out,
           const BlockSize& size) {
    const int64_t units = minimum(depth_units<C>(depth), kUnits), task_rows = round_up(size.rows, kLaneGroup<C>);
    left_panels_.once(task_rows * kUnits);
    right_panels_.once(kPackedCols * kUnits);
    lane_sums_.once(size.cols);
    // Sums wait for the next step of the depth; where there is one only, each panel of columns is written at once.
    const int64_t panel = depth > kDepthStep ? task_rows * kCols<C> : 0;
    (panel ? all_sums_ : panel_sums_).once(task_rows * (panel ? round_up(size.cols, kCols<C>) : kCols<C>));
    if (out.lane_sums) memset(lane_sums_.get(), 0, sizeof(A) * static_cast<size_t>(size.cols));
    int64_t k = 0;
    do {  // once without depth: results are what they begin with
      Step s{minimum(depth - k, kDepthStep), units, k == 0, false};
      s.last = k + s.depth == depth;
      pack<Side::a>(left.from(0, k), out.rows, s, left_panels_.get());
      for (int64_t j = 0; j < out.cols; j += kPackedCols) {
        const int64_t cols = minimum(kPackedCols, out.cols - j);
        const Operand<T> columns = right.from(j, k);
        if (out.lane_sums) add_lanes(columns, cols, s.depth, lane_sums_.get() + j);
        if (out.rows == 0) continue;
        pack<Side::b>(columns, cols, s, right_panels_.get());
        ReadAhead<T> ahead = after(right, j, k, out.cols, depth);
        const int64_t lines = ceil_divide(ahead.left(), ceil_divide(out.rows, kRows<C>) * ceil_divide(cols, kCols<C>));
        for (int64_t q = 0; q < cols; q += kCols<C>) {
          A* sums = panel ? all_sums_.get() + (j + q) / kCols<C> * panel : panel_sums_.get();
          multiply_panel(out, j + q, s, right_panels_.get() + q * units, sums, ahead, lines);
        }
      }
      k += s.depth;
    } while (k < depth);
    if (out.lane_sums) narrow(lane_sums_.get(), out.cols, out.lane_sums);
    if (out.stream) finish_streams();
  }

 private:
  static constexpr int64_t kDepthStep = kUnits * C::kDepth;
  struct Step {
    int64_t depth, units;  // units from one lane group of a panel to the next: those of the longest step
    bool first, last;
  };

  template <Side side>
  static void pack(const Operand<T>& from, int64_t lanes, const Step& s, U* to) {
    const int64_t panel_stride = kPanelLanes<C, side> * s.units;
    from.with_rows([&](const auto& rows) {
      if (from.rows_are_lanes) {
        pack_rows<C, side>(to, panel_stride, rows, lanes, lanes, s.depth);
      } else {
        pack_columns<C, side>(to, panel_stride, rows, lanes, s.depth);
      }
    });
  }

  // The columns that are packed after those at j and k.
  static ReadAhead<T> after(const Operand<T>& right, int64_t j, int64_t k, int64_t columns, int64_t depth) {
    j += kPackedCols;
    if (j >= columns) {
      j = 0;
      k = minimum(k + kDepthStep, depth);
    }
    return {right.from(j, k), minimum(kPackedCols, columns - j), minimum(kDepthStep, depth - k)};
  }

  // One panel of columns times all rows. Tiles are whole ones, on sums of their own: what an output's sum is rounded
  // to does not depend on where it lies.
  void multiply_panel(const OutputBlock<T>& out, int64_t j, const Step& s, const U* columns, A* sums,
                      ReadAhead<T>& ahead, int64_t lines) {
    const int64_t cols = minimum<int64_t>(kCols<C>, out.cols - j), units = depth_units<C>(s.depth);
    if (s.first && out.initial) {
      alignas(64) A initial[kCols<C>] = {};
      widen_row(out.initial + j, cols, initial);
      for (int64_t r = 0; r < out.rows; ++r) memcpy(sums + r * kCols<C>, initial, sizeof(initial));
    }
    int64_t u = 0;
    do {
      const int64_t tile_units = minimum(units - u, kTileUnits);
      const bool add = !s.first || u > 0 || out.initial, finished = s.last && u + tile_units == units;
      for (int64_t r = 0; r < out.rows; r += kRows<C>) {
        if (u == 0) ahead.fetch(lines);
        A* to = sums + r * kCols<C>;
        tile<C>(tile_units, left_panels_.get() + r * s.units + u * kRows<C>, columns + u * kCols<C>, to, kCols<C>, add);
        if (finished) write_rows(out, r, j, cols, to);
      }
      u += tile_units;
    } while (u < units);
  }

  void write_rows(const OutputBlock<T>& out, int64_t begin, int64_t j, int64_t cols, const A* sums) const {
    constexpr int64_t bytes = kCols<C> * sizeof(T), line = 64;
    for (int64_t r = begin; r < minimum<int64_t>(begin + kRows<C>, out.rows); ++r, sums += kCols<C>) {
      T* to = out.data + r * out.stride + j;
      const bool whole_lines = bytes % line == 0 && reinterpret_cast<uintptr_t>(to) % line == 0 && cols == kCols<C>;
      if (!out.stream || !whole_lines) {
        narrow(sums, cols, to);
        continue;
      }
      alignas(64) T rounded[kCols<C>];
      narrow(sums, kCols<C>, rounded);
      for (int64_t at = 0; at < bytes; at += line) {
        stream_line(reinterpret_cast<char*>(to) + at, reinterpret_cast<const char*>(rounded) + at);
      }
    }
  }

  // Sums of a step of their own first: long sums lose fewer digits in parts.
  void add_lanes(const Operand<T>& from, int64_t lanes, int64_t depth, A* sums) {
    constexpr int W = kLanes<A>;
    alignas(64) A part[kPackedCols] = {}, wide[kPackedCols];
    from.with_rows([&](const auto& row) {
      for (int64_t k = 0; k < depth; ++k) {
        if (!from.rows_are_lanes) widen_row(row(k), lanes, wide);
        for (int64_t q = 0; from.rows_are_lanes && q < lanes; ++q) widen_row(row(q) + k, 1, wide + q);
        for (int64_t q = 0; q < lanes; q += W) store(part + q, load(part + q) + load(wide + q));
      }
    });
    for (int64_t q = 0; q < lanes; ++q) sums[q] += part[q];
  }

  static void widen_row(const T* from, int64_t size, A* to) {
    constexpr int W = kLanes<A>;
    int64_t q = 0;
    for (; q + W <= size; q += W) store(to + q, to_accumulator<A>(from + q));
    if (q == size) return;
    T tail[W] = {};
    alignas(64) A wide[W];
    memcpy(tail, from + q, static_cast<size_t>(size - q) * sizeof(T));
    store(wide, to_accumulator<A>(tail));
    memcpy(to + q, wide, static_cast<size_t>(size - q) * sizeof(A));
  }
  static void narrow(const A* from, int64_t size, T* to) {
    constexpr int W = kLanes<A>;
    int64_t q = 0;
    for (; q + W <= size; q += W) store_as(to + q, load(from + q));
    if (q == size) return;
    alignas(64) A tail[W] = {};
    T rounded[W];
    memcpy(tail, from + q, static_cast<size_t>(size - q) * sizeof(A));
    store_as(rounded, load(tail));
    memcpy(to + q, rounded, static_cast<size_t>(size - q) * sizeof(T));
  }

  Buffer<U> left_panels_, right_panels_;
  Buffer<A> all_sums_, panel_sums_, lane_sums_;
};

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

}  // namespace

GroupedMatmul grouped_matmul() { return {grouped_forward_any, grouped_outer_any}; }

}  // namespace LEVEL
}  // namespace contrastive_ops
