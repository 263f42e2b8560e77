// The packed tile loop that every primitive runs on: C (m x n) (+)= A^T B over packed panels.
//
// A panels hold kRows lanes, B panels kCols lanes; both are depth-major, so that one step of the depth loop reads
// kRows numbers to broadcast and kCols numbers as vectors, and all accumulators stay in registers. The depth loop
// is not blocked: 32 columns of B stay in a 1 MiB level-2 cache up to a depth of several thousand (at 768 the tile
// measured 2% slower than at 256), and complete inner products reach the epilogue.
#pragma once

#include "../similarity_problem.h"
#include "simd.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// What is multiplied. `Unit` is what one lane of a packed panel holds: `kDepth` consecutive numbers.
struct ComputeFloat {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kDepth = 1;
};
struct ComputeDouble {
  using Acc = double;
  using Unit = uint64_t;
  static constexpr int kDepth = 1;
};
#ifdef HAS_BF16_DOT
struct ComputeBFloat16 {  // pairs of bfloat16 numbers, products accumulated in float32
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int kDepth = 2;
};

// float32 rounded to bfloat16, and what pairs of bfloat16 numbers add to float32 sums.
#if defined(__aarch64__)
INLINE HalfWidth to_bfloat16(Vec<float> v) { return bit_cast<HalfWidth>(vcvt_bf16_f32(bit_cast<float32x4_t>(v))); }
INLINE Vec<uint32_t> to_bfloat16(Vec<float> first, Vec<float> second) {
  const auto half = vcvtq_low_bf16_f32(bit_cast<float32x4_t>(first));
  return bit_cast<Vec<uint32_t>>(vcvtq_high_bf16_f32(half, bit_cast<float32x4_t>(second)));
}
INLINE Vec<float> plus_dot(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  return bit_cast<Vec<float>>(
      vbfdotq_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b)));
}
#else
INLINE HalfWidth to_bfloat16(Vec<float> v) { return bit_cast<HalfWidth>(_mm512_cvtneps_pbh(v)); }
INLINE Vec<uint32_t> to_bfloat16(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<uint32_t>>(_mm512_cvtne2ps_pbh(second, first));
}
INLINE Vec<float> plus_dot(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#endif
#endif

// Whether tiles are multiplied by AMX, whose registers hold 16 lanes of 16 units.
#ifdef HAS_AMX
template <class C>
constexpr bool kTiled = C::kDepth == 2;
#else
template <class C>
constexpr bool kTiled = false;
#endif

#ifdef HAS_BF16_DOT
using ComputeForBFloat16 = ComputeBFloat16;
#else
using ComputeForBFloat16 = ComputeFloat;
#endif

// Calls call(C(), S()) with what numbers of a dtype are multiplied as, and what they are stored as. Where a level adds
// nothing but products of bfloat16 numbers it leaves other dtypes to below(), the level that has all the rest of it.
template <class Call, class Below>
void for_type(DType dtype, Call call, Below below) {
#ifdef HAS_BF16_DOT
  dtype == DType::bfloat16 ? call(ComputeBFloat16(), BFloat16()) : below();
#else
  switch (dtype) {
    case DType::float32:
      return call(ComputeFloat(), float());
    case DType::float64:
      return call(ComputeDouble(), double());
    case DType::bfloat16:
      return call(ComputeForBFloat16(), BFloat16());
    case DType::float16:
      return call(ComputeFloat(), Half());
  }
#endif
}

// Calls call(C()) with what numbers of a dtype are multiplied as; below() as in for_type.
template <class Call, class Below>
void for_compute(DType dtype, Call call, Below below) {
#ifdef HAS_BF16_DOT
  dtype == DType::bfloat16 ? call(ComputeBFloat16()) : below();
#else
  dtype == DType::float64 ? call(ComputeDouble()) : call(ComputeFloat());
#endif
}

// Where numbers are that are multiplied as C; `codes`: they may be int8. Their type is known at run time alone: what
// sweeps over a matrix is compiled once for each C, not for each type, which would take twice as long to compile, and
// what reads numbers asks for their type once a call.
template <class C, bool codes = false>
class StoredNumbers {
 public:
  StoredNumbers(const void* data, DType dtype, bool coded = false)
      : data_(static_cast<const char*>(data)), dtype_(dtype), coded_(coded) {}
  StoredNumbers operator+(int64_t count) const { return {data_ + count * size(), dtype_, coded_}; }
  // Calls call(pointer) with a pointer of the type.
  template <class Call>
  INLINE void visit(Call call) const {
    if constexpr (codes && sizeof(typename C::Unit) == 4) {
      if (coded_) return call(reinterpret_cast<const int8_t*>(data_));
    }
    if constexpr (sizeof(typename C::Unit) == 8) {
      call(reinterpret_cast<const double*>(data_));
    } else if constexpr (C::kDepth == 2) {
      call(reinterpret_cast<const BFloat16*>(data_));
    } else if (dtype_ == DType::float32) {
      call(reinterpret_cast<const float*>(data_));
    } else if (dtype_ == DType::bfloat16) {
      call(reinterpret_cast<const BFloat16*>(data_));
    } else {
      call(reinterpret_cast<const Half*>(data_));
    }
  }

 private:
  int64_t size() const { return coded_ ? 1 : dtype_ == DType::float64 ? 8 : dtype_ == DType::float32 ? 4 : 2; }

  const char* data_;
  DType dtype_;
  bool coded_;
};

// A number as it is multiplied: packing rounds float32 to bfloat16 for the pairs.
template <class C>
INLINE Vec<typename C::Acc> rounded(Vec<typename C::Acc> v) {
#ifdef HAS_BF16_DOT
  if constexpr (C::kDepth == 2) {
    return bit_cast<Vec<float>>(Vec<uint32_t>(widen(to_bfloat16(v)) << 16));
  }
#endif
  return v;
}

// 8 x 32 on AVX-512 and 8 x 8 on NEON (16 accumulators of 32 registers), 4 x 16 on AVX2, 4 x 8 on SSE2: enough
// independent sums to hide the latency of a fused multiply-add, few enough loads to keep all multipliers busy.
// 32 x 32 on AMX: four accumulators, so that each load is used twice.
#if defined(__aarch64__)
constexpr bool kMultipliesByLane = true;  // an instruction takes any lane of a vector as its factor
#else
constexpr bool kMultipliesByLane = false;
#endif
template <class C>
constexpr int kRows = kTiled<C>                                 ? 32
                      : VECTOR_BYTES == 64 || kMultipliesByLane ? 8
                                                                : 4;
constexpr int kVectors = 2;
template <class C>
constexpr int kCols = kVectors * kLanes<typename C::Acc>;
// Packing works on whole vectors of lanes, so panels are laid out for a multiple of both.
template <class C>
constexpr int kLaneGroup = kRows<C> > kCols<C> ? kRows<C> : kCols<C>;
template <class C>
constexpr bool kPanelsAreWhole =
    kLaneGroup<C> % kRows<C> == 0 && kLaneGroup<C> % kCols<C> == 0 && kLaneGroup<C> % kLanes<typename C::Unit> == 0;
static_assert(kPanelsAreWhole<ComputeFloat> && kPanelsAreWhole<ComputeDouble> && kPanelsAreWhole<ComputeForBFloat16>,
              "what is packed group by group ends with a panel of either side");

// The side of a product that a panel is for, and its lanes.
enum class Side { a, b };
template <class C, Side side>
constexpr int kPanelLanes = side == Side::a ? kRows<C> : kCols<C>;

// Units of a panel along the depth; those past the end are zero.
template <class C>
INLINE int64_t depth_units(int64_t depth) {
  const int64_t units = (depth + C::kDepth - 1) / C::kDepth;
  return kTiled<C> ? round_up(units, 16) : units;
}

// ---- Units from source elements --------------------------------------------------------------------------

// `along`: kLanes units of one row, consecutive in depth.
template <class S>
INLINE Vec<uint32_t> units_along(ComputeFloat, const S* from) {
  return bit_cast<Vec<uint32_t>>(to_float(from));
}
INLINE Vec<uint64_t> units_along(ComputeDouble, const double* from) { return bit_cast<Vec<uint64_t>>(load(from)); }
// `across`: kLanes units at one depth; `next` is the row that follows in depth (only pairs read it).
template <class S>
INLINE Vec<uint32_t> units_across(ComputeFloat c, const S* from, const S*) {
  return units_along(c, from);
}
INLINE Vec<uint64_t> units_across(ComputeDouble c, const double* from, const double*) { return units_along(c, from); }
#ifdef HAS_BF16_DOT
INLINE Vec<uint32_t> units_along(ComputeBFloat16, const BFloat16* from) {
  Vec<uint32_t> pairs;  // a row may begin between two of them
  memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}
INLINE Vec<uint32_t> units_along(ComputeBFloat16, const float* from) {
  return to_bfloat16(load(from), load(from + kLanes<float>));
}
INLINE Vec<uint32_t> units_along(ComputeBFloat16, const int8_t* from) {  // exact: codes have seven bits
  return to_bfloat16(to_float(from), to_float(from + kLanes<float>));
}
INLINE Vec<uint32_t> pair(Vec<uint32_t> first, Vec<uint32_t> second) { return first | (second << 16); }
INLINE Vec<uint32_t> units_across(ComputeBFloat16, const BFloat16* from, const BFloat16* next) {
  return pair(widen(load_half_width(from)), widen(load_half_width(next)));
}
INLINE Vec<uint32_t> units_across(ComputeBFloat16, const float* from, const float* next) {
  return pair(widen(to_bfloat16(load(from))), widen(to_bfloat16(load(next))));
}
#endif

// ---- Packing ---------------------------------------------------------------------------------------------

// Stores one vector of lanes at `depth` of the panel, or of the two panels, that they belong to.
template <class C, int Lanes>
INLINE void store_group(typename C::Unit* to, int64_t panel_stride, int64_t group, int64_t depth,
                        Vec<typename C::Unit> units) {
  using U = typename C::Unit;
  constexpr int width = kLanes<U>;
  static_assert(width <= 2 * Lanes, "a vector spans two panels at most");
  const int64_t lane = group * width;
  U* at = to + lane / Lanes * panel_stride + depth * Lanes + lane % Lanes;
  if constexpr (width == 2 * Lanes) {
    constexpr auto half = std::make_index_sequence<Lanes>{};
    store_half<0>(at, units, half);
    store_half<Lanes>(at + panel_stride, units, half);
  } else {
    store(at, units);
  }
}

// Where AMX reads the A side: squares of 16 lanes, 16 units each, two squares for one step of the depth.
template <class C>
INLINE void store_square(typename C::Unit* to, int64_t panel_stride, int64_t group, int64_t depth,
                         const Vec<typename C::Unit>* lanes) {
  constexpr int width = kLanes<typename C::Unit>;
  const int64_t lane = group * width;
  auto* at = to + lane / kRows<C> * panel_stride + depth * kRows<C> + lane % kRows<C> * width;
#pragma GCC unroll 16
  for (int r = 0; r < width; ++r) store(at + r * width, lanes[r]);
}

// The rows of a source by their index: any type that has `Element` and this operator will do.
template <class S>
struct EvenRows {
  using Element = S;
  const S* from;
  int64_t stride;
  INLINE const S* operator()(int64_t row) const { return from + row * stride; }
};

// Packs lanes that are rows of the source (depth runs along a row): a transpose.
// Panels are `panel_stride` units apart; lanes from `lanes` up to `filled_lanes`, rounded up to kLaneGroup, are zero.
template <class C, Side side, class Rows>
void pack_rows(typename C::Unit* to, int64_t panel_stride, const Rows& row, int64_t lanes, int64_t filled_lanes,
               int64_t depth) {
  using S = typename Rows::Element;
  using U = typename C::Unit;
  constexpr int width = kLanes<U>, step = width * C::kDepth;
  const int64_t groups = round_up(filled_lanes, kLaneGroup<C>) / width;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t k = 0; k < depth; k += step) {
      Vec<U> tile[width];
      const int64_t left = depth - k;
#pragma GCC unroll 16
      for (int r = 0; r < width; ++r) {
        const int64_t lane = group * width + r;
        if (lane >= lanes) {
          tile[r] = Vec<U>{};
        } else if (left >= step) {
          tile[r] = units_along(C{}, row(lane) + k);
        } else {
          S tail[step] = {};
          for (int64_t q = 0; q < left; ++q) tail[q] = row(lane)[k + q];
          tile[r] = units_along(C{}, tail);
        }
      }
      if constexpr (kTiled<C> && side == Side::a) {
        store_square<C>(to, panel_stride, group, k / C::kDepth, tile);
        continue;
      }
      transpose<U>(tile);
      const int64_t filled = minimum<int64_t>(width, depth_units<C>(left));
#pragma GCC unroll 16
      for (int u = 0; u < width; ++u) {
        if (u < filled) store_group<C, kPanelLanes<C, side>>(to, panel_stride, group, k / C::kDepth + u, tile[u]);
      }
    }
  }
}

template <class C, Side side, class S>
void pack_rows(typename C::Unit* to, int64_t panel_stride, const S* from, int64_t stride, int64_t lanes,
               int64_t filled_lanes, int64_t depth) {
  pack_rows<C, side>(to, panel_stride, EvenRows<S>{from, stride}, lanes, filled_lanes, depth);
}

template <class C, Side side, class K, bool codes>
void pack_rows(typename C::Unit* to, int64_t panel_stride, StoredNumbers<K, codes> from, int64_t stride, int64_t lanes,
               int64_t filled_lanes, int64_t depth) {
  from.visit([&](const auto* rows) { pack_rows<C, side>(to, panel_stride, rows, stride, lanes, filled_lanes, depth); });
}

// Packs lanes that are columns of the source (depth runs down the rows): a copy.
template <class C, Side side, class Rows>
void pack_columns(typename C::Unit* to, int64_t panel_stride, const Rows& row, int64_t lanes, int64_t depth) {
  using S = typename Rows::Element;
  using U = typename C::Unit;
  constexpr int width = kLanes<U>;
  const int64_t groups = round_up(lanes, kLaneGroup<C>) / width;
  const S zeros[width] = {};
  // Groups outside: panels lie a power of two apart, and writing to all of them in turn would hit one cache set.
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t lane = group * width;
    const auto units_at = [&](int64_t k) {
      if (k >= depth) return Vec<U>{};
      const bool has_next = k + 1 < depth;
      if (lane + width <= lanes) return units_across(C{}, row(k) + lane, has_next ? row(k + 1) + lane : zeros);
      S first[width] = {}, second[width] = {};
      for (int64_t q = 0; q < lanes - lane; ++q) {
        first[q] = row(k)[lane + q];
        if (C::kDepth == 2 && has_next) second[q] = row(k + 1)[lane + q];
      }
      return units_across(C{}, first, second);
    };
    const int64_t units = depth_units<C>(depth);
    if constexpr (kTiled<C> && side == Side::a) {
      for (int64_t u = 0; u < units; u += width) {
        Vec<U> square[width];
        for (int q = 0; q < width; ++q) square[q] = units_at((u + q) * C::kDepth);
        transpose<U>(square);
        store_square<C>(to, panel_stride, group, u, square);
      }
    } else {
      for (int64_t u = 0; u < units; ++u) {
        store_group<C, kPanelLanes<C, side>>(to, panel_stride, group, u, units_at(u * C::kDepth));
      }
    }
  }
}

template <class C, Side side, class S>
void pack_columns(typename C::Unit* to, int64_t panel_stride, const S* from, int64_t stride, int64_t lanes,
                  int64_t depth) {
  pack_columns<C, side>(to, panel_stride, EvenRows<S>{from, stride}, lanes, depth);
}

template <class C, Side side, class K>
void pack_columns(typename C::Unit* to, int64_t panel_stride, StoredNumbers<K> from, int64_t stride, int64_t lanes,
                  int64_t depth) {
  from.visit([&](const auto* rows) { pack_columns<C, side>(to, panel_stride, rows, stride, lanes, depth); });
}

// ---- The tile ----------------------------------------------------------------------------------------------

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
