// A block of a grouped product: a sum over steps of the depth of packed panels, in the memory of one thread.
#pragma once

#include "../grouped_matmul.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Units of depth that are packed at a time, and columns: with the rows they take half of a level-2 cache of 2 MiB.
constexpr int64_t kUnits = 512, kPackedCols = 128;
// Units of depth that are multiplied at a time: one panel of columns stays in the level-1 cache.
constexpr int64_t kTileUnits = 256;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a row that is listed as -1 holds: as many zeros as are packed of one.
template <class T>
alignas(64) constexpr T kZeroRow[2 * kUnits] = {};

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

template <class A, class To>
void narrow(const A* from, int64_t size, To* to) {
  constexpr int W = kLanes<A>;
  int64_t q = 0;
  for (; q + W <= size; q += W) store_as(to + q, load(from + q));
  if (q == size) return;
  alignas(64) A tail[W] = {};
  To rounded[W];
  memcpy(tail, from + q, static_cast<size_t>(size - q) * sizeof(A));
  store_as(rounded, load(tail));
  memcpy(to + q, rounded, static_cast<size_t>(size - q) * sizeof(To));
}

// Computes blocks in the memory of one thread, on cache lines of its own. C: what is multiplied, T: the type of the
// matrices.
template <class C, class T>
class alignas(64) BlockProduct {
 public:
  using A = typename C::Acc;
  using U = typename C::Unit;

  static constexpr int64_t kDepthStep = kUnits * C::kDepth;

  // All blocks of a thread are within the same size. Out: T, or the type of sums.
  template <class Out>
  void run(const Operand<T>& left, const Operand<T>& right, int64_t depth, const OutputBlock<Out>& out,
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
  template <class Out>
  void multiply_panel(const OutputBlock<Out>& out, int64_t j, const Step& s, const U* columns, A* sums,
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

  template <class Out>
  void write_rows(const OutputBlock<Out>& out, int64_t begin, int64_t j, int64_t cols, const A* sums) const {
    constexpr int64_t bytes = kCols<C> * sizeof(Out), line = 64;
    for (int64_t r = begin; r < minimum<int64_t>(begin + kRows<C>, out.rows); ++r, sums += kCols<C>) {
      Out* to = out.data + r * out.stride + j;
      const bool whole_lines = bytes % line == 0 && reinterpret_cast<uintptr_t>(to) % line == 0 && cols == kCols<C>;
      if (!out.stream || !whole_lines) {
        narrow(sums, cols, to);
        continue;
      }
      alignas(64) Out rounded[kCols<C>];
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

  template <class From>
  static void widen_row(const From* from, int64_t size, A* to) {
    constexpr int W = kLanes<A>;
    int64_t q = 0;
    for (; q + W <= size; q += W) store(to + q, to_accumulator<A>(from + q));
    if (q == size) return;
    From tail[W] = {};
    alignas(64) A wide[W];
    memcpy(tail, from + q, static_cast<size_t>(size - q) * sizeof(From));
    store(wide, to_accumulator<A>(static_cast<const From*>(tail)));
    memcpy(to + q, wide, static_cast<size_t>(size - q) * sizeof(A));
  }
  Buffer<U> left_panels_, right_panels_;
  Buffer<A> all_sums_, panel_sums_, lane_sums_;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
