// The packed tile loop that every primitive runs on: C (m x n) (+)= A^T B over packed panels.
//
// A panels hold kRows lanes, B panels kCols lanes; both are depth-major, so that one step of the depth loop reads
// kRows numbers to broadcast and kCols numbers as vectors, and all accumulators stay in registers. The depth loop
// is not blocked: 32 columns of B stay in a 1 MiB level-2 cache up to a depth of several thousand (at 768 the tile
// measured 2% slower than at 256), and complete inner products reach the epilogue.
#pragma once

#include "similarity_packing.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class C>
INLINE void multiply_add(Vec<typename C::Acc>& sum, typename C::Unit a, Vec<typename C::Unit> b) {
  using A = typename C::Acc;
#ifdef HAS_BF16_DOT
  if constexpr (C::kDepth == 2) {
    sum = plus_dot(sum, broadcast(a), b);
    return;
  }
#endif
  sum += bit_cast<A>(a) * bit_cast<Vec<A>>(b);
}

#if defined(__aarch64__)
// The same with one lane of a vector as `a`, an operand of the instruction. The compilers know no better: GCC loads
// each lane on its own, and Clang copies lanes to vectors.
template <class C, int Lane>
INLINE void multiply_add_lane(Vec<typename C::Acc>& sum, Vec<typename C::Unit> a, Vec<typename C::Unit> b) {
  if constexpr (C::kDepth == 2) {
    __asm__("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(sum) : "w"(b), "w"(a), "i"(Lane));
  } else if constexpr (sizeof(typename C::Acc) == 4) {
    __asm__("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(sum) : "w"(b), "w"(a), "i"(Lane));
  } else {
    __asm__("fmla %0.2d, %1.2d, %2.d[%3]" : "+w"(sum) : "w"(b), "w"(a), "i"(Lane));
  }
}
template <class C, int... Row>
INLINE void multiply_add_lanes(Vec<typename C::Acc> (*sums)[kVectors], const Vec<typename C::Unit>* rows,
                               const Vec<typename C::Unit>* columns, std::integer_sequence<int, Row...>) {
  constexpr int width = kLanes<typename C::Unit>;
  static_assert(kVectors == 2, "one instruction for each");
  ((multiply_add_lane<C, Row % width>(sums[Row][0], rows[Row / width], columns[0]),
    multiply_add_lane<C, Row % width>(sums[Row][1], rows[Row / width], columns[1])),
   ...);
}
#endif

// Adds one step of the depth to the sums of a tile.
template <class C>
INLINE void add_step(Vec<typename C::Acc> (*sums)[kVectors], const typename C::Unit* a, const typename C::Unit* b) {
  using U = typename C::Unit;
  constexpr int width = kLanes<U>;
  Vec<U> columns[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * width);
#if defined(__aarch64__)
  Vec<U> rows[kRows<C> / width];
#pragma GCC unroll 8
  for (int i = 0; i < kRows<C> / width; ++i) rows[i] = load(a + i * width);
  multiply_add_lanes<C>(sums, rows, columns, std::make_integer_sequence<int, kRows<C>>{});
#else
#pragma GCC unroll 16
  for (int i = 0; i < kRows<C>; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) multiply_add<C>(sums[i][v], a[i], columns[v]);
  }
#endif
}

#ifdef HAS_AMX
// The headers of GCC say of the configuration that 8 of its 64 bytes are read, and of a load of a tile nothing, so what
// is stored before may be stored after: every store that a tile instruction reads must come before one of these.
INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

// All 8 registers with 16 rows of 64 bytes. A constant, because the stores of a local one were left until later.
struct TileShapes {
  uint8_t bytes[64] = {1};
  constexpr TileShapes() {
    for (int t = 0; t < 8; ++t) {
      bytes[16 + 2 * t] = 64;
      bytes[48 + t] = 16;
    }
  }
};
alignas(64) constexpr TileShapes kTileShapes;

// The tile registers of this thread, all 16 lanes x 16 units, as long as this lives.
struct TileRegisters {
  TileRegisters() { _tile_loadconfig(&kTileShapes); }
  ~TileRegisters() { _tile_release(); }
};

// 32 x 32 outputs; each step of 16 units is 4 KiB of loads for 64 cycles of products.
INLINE void amx_tile(int64_t depth, const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, bool add) {
  finish_stores();
  const int64_t c_stride = ldc * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, c, c_stride);
    _tile_loadd(1, c + 16, c_stride);
    _tile_loadd(2, c + 16 * ldc, c_stride);
    _tile_loadd(3, c + 16 * ldc + 16, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16, a += 16 * 32, b += 16 * 32) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 16, 128);
    _tile_loadd(5, a + 16 * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_stride);
  _tile_stored(1, c + 16, c_stride);
  _tile_stored(2, c + 16 * ldc, c_stride);
  _tile_stored(3, c + 16 * ldc + 16, c_stride);
}
#endif

#if defined(__aarch64__)
#define OWN_REGISTERS __attribute__((noinline))  // as part of another function it would keep addresses in memory
#else
#define OWN_REGISTERS
#endif
// kRows x kCols outputs over `depth` units; adds to C if `add`.
template <class C>
OWN_REGISTERS void tile(int64_t depth, const typename C::Unit* a, const typename C::Unit* b, typename C::Acc* c,
                        int64_t ldc, bool add) {
#ifdef HAS_AMX
  if constexpr (kTiled<C>) return amx_tile(depth, a, b, c, ldc, add);
#endif
  using A = typename C::Acc;
  constexpr int width = kLanes<A>;
  // The outputs are met once per depth loop and lie far apart: without the hint their misses end every tile.
#pragma GCC unroll 16
  for (int i = 0; i < kRows<C>; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + i * ldc + v * width, 1);
  }
  Vec<A> sums[kRows<C>][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows<C>; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec<A>{};
  }
  int64_t k = 0;
  if constexpr (kMultipliesByLane) {  // small tiles: two steps share what the loop itself costs
    for (; k + 1 < depth; k += 2) {
      add_step<C>(sums, a + k * kRows<C>, b + k * kCols<C>);
      add_step<C>(sums, a + (k + 1) * kRows<C>, b + (k + 1) * kCols<C>);
    }
    if (k < depth) add_step<C>(sums, a + k * kRows<C>, b + k * kCols<C>);
  } else {
    for (; k < depth; ++k) add_step<C>(sums, a + k * kRows<C>, b + k * kCols<C>);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows<C>; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* at = c + i * ldc + v * width;
      store(at, add ? load(at) + sums[i][v] : sums[i][v]);
    }
  }
}

// What one AMX step adds to a lane's sum: the even and the odd products on their own, each fused, and then their sum.
INLINE Vec<float> as_one_tile_step(const uint32_t* a, const Vec<uint32_t>* b) {
  Vec<float> even = {}, odd = {};
#pragma GCC unroll 16
  for (int u = 0; u < kLanes<float>; ++u) {
    const float low = bit_cast<float>(a[u] << 16), high = bit_cast<float>(a[u] & 0xFFFF0000u);
    even += low * bit_cast<Vec<float>>(Vec<uint32_t>(b[u] << 16));
    odd += high * bit_cast<Vec<float>>(Vec<uint32_t>(b[u] & 0xFFFF0000u));
  }
  return even + odd;
}

// Inner products of a panel's first kRowCount rows with kLanes rows of the source, for few rows, where packing the
// source would cost more than multiplying. Sums run along the depth as in `tile`, so the products are the same to the
// bit. `next` are the rows of the following call: the processor reads ahead within a row, not from one to another.
template <class C, int kRowCount, class S>
void products_with(const typename C::Unit* panel, const S* const* from, const S* const* next, int64_t depth,
                   typename C::Acc* out, int64_t out_stride) {
  using A = typename C::Acc;
  using U = typename C::Unit;
  constexpr int width = kLanes<U>, step = width * C::kDepth;
  Vec<A> sums[kRowCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRowCount; ++r) sums[r] = Vec<A>{};
  for (int64_t k = 0; k < depth; k += step) {
    Vec<U> tile[width];
    const int64_t left = depth - k;
    if (left >= step) {
#pragma GCC unroll 16
      for (int q = 0; q < width; ++q) {
        tile[q] = units_along(C{}, from[q] + k);
        __builtin_prefetch(next[q] + k, 0, 2);
      }
    } else {
      for (int q = 0; q < width; ++q) {
        S tail[step] = {};
        for (int64_t e = 0; e < left; ++e) tail[e] = from[q][k + e];
        tile[q] = units_along(C{}, tail);
      }
    }
    transpose<U>(tile);
    const U* a = panel + k / C::kDepth * kRows<C>;
    if constexpr (kTiled<C>) {
#pragma GCC unroll 4
      for (int r = 0; r < kRowCount; ++r) sums[r] += as_one_tile_step(a + r * width, tile);
    } else {
      const int64_t filled = minimum<int64_t>(width, depth_units<C>(left));
#pragma GCC unroll 16
      for (int u = 0; u < width; ++u) {
        if (u < filled) {
#pragma GCC unroll 4
          for (int r = 0; r < kRowCount; ++r) multiply_add<C>(sums[r], a[u * kRows<C> + r], tile[u]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRowCount; ++r) store(out + r * out_stride, sums[r]);
}

// C (m x n) (+)= A^T B, m and n arbitrary: tiles that stick out go through a small buffer.
template <class C>
void multiply(int64_t m, int64_t n, int64_t depth, const typename C::Unit* a, int64_t a_panel_stride,
              const typename C::Unit* b, int64_t b_panel_stride, typename C::Acc* c, int64_t ldc, bool add) {
  using A = typename C::Acc;
  constexpr int cols = kCols<C>;
  for (int64_t j = 0; j < n; j += cols) {
    const typename C::Unit* panel = b + j / cols * b_panel_stride;
    for (int64_t i = 0; i < m; i += kRows<C>) {
      const typename C::Unit* rows = a + i / kRows<C> * a_panel_stride;
      if (i + kRows<C> <= m && j + cols <= n) {
        tile<C>(depth, rows, panel, c + i * ldc + j, ldc, add);
        continue;
      }
      alignas(64) A edge[kRows<C> * cols];
      tile<C>(depth, rows, panel, edge, cols, false);
      for (int64_t r = 0; r < minimum<int64_t>(kRows<C>, m - i); ++r) {
        for (int64_t q = 0; q < minimum<int64_t>(cols, n - j); ++q) {
          A* at = c + (i + r) * ldc + j + q;
          *at = add ? *at + edge[r * cols + q] : edge[r * cols + q];
        }
      }
    }
  }
}

// The work of a parallel region, in multiply-adds, from which threads pay: less is done within the 80 us that it takes
// to wake a thread that sleeps, as those of a training step do between two losses. Numbers that are moved or that an
// exponential is taken of are worth several.
constexpr int64_t kWorthThreads = int64_t{2} << 20;
constexpr int64_t kWorkOfMove = 4, kWorkOfFold = 16;

inline void run_in_order(int64_t count, void (*task)(void*, int64_t, int), void* context) {
  for (int64_t index = 0; index < count; ++index) task(context, index, 0);
}

// Runs body(index, thread) for every index in [0, count); `work` is that of all of them. Every multiplication happens
// in such a body.
template <class Body>
void run_parallel(void (*run)(int64_t, void (*)(void*, int64_t, int), void*), int64_t count, Body& body,
                  int64_t work = kWorthThreads) {
  const auto task = [](void* context, int64_t index, int thread) {
#ifdef HAS_AMX
    const TileRegisters registers;
#endif
    (*static_cast<Body*>(context))(index, thread);
  };
  (work < kWorthThreads ? run_in_order : run)(count, task, &body);
}
// The same for the tasks of stages.
template <class Body>
void run_stages(const Parallel& parallel, int stage_count, const Stage* stages, Body& body,
                int64_t work = kWorthThreads) {
  int64_t count = 0;
  for (int s = 0; s < stage_count; ++s) count += stages[s].tasks;
  if (work < kWorthThreads) return run_parallel(parallel.run, count, body, work);
  const auto task = [](void* context, int64_t index, int thread) {
#ifdef HAS_AMX
    const TileRegisters registers;
#endif
    (*static_cast<Body*>(context))(index, thread);
  };
  parallel.run_stages(stage_count, stages, task, &body);
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
