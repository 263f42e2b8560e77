// What is multiplied, and its packed panels, as the tile loop of similarity_tile.h reads them.
//
// A panels hold kRows lanes, B panels kCols lanes; both are depth-major, so that one step of the depth loop reads
// kRows numbers to broadcast and kCols numbers as vectors.
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

// 8 x 32 on AVX-512 and 8 x 8 on NEON (4 x 4 in float64; 16 accumulators of 32 registers), 4 x 16 on AVX2, 4 x 8 on
// SSE2: enough independent sums to hide the latency of a fused multiply-add, few enough loads to keep all multipliers
// busy. 32 x 32 on AMX: four accumulators, so that each load is used twice.
#if defined(__aarch64__)
constexpr bool kMultipliesByLane = true;  // an instruction takes any lane of a vector as its factor
#else
constexpr bool kMultipliesByLane = false;
#endif
template <class C>
constexpr int kRows = kTiled<C>                                                                   ? 32
                      : VECTOR_BYTES == 64 || (kMultipliesByLane && sizeof(typename C::Acc) == 4) ? 8
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
}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
