// Vectors of one SIMD level: element types, conversions, exp, transpose.
//
// Compiled once per level. Everything is in an unnamed namespace: a function that had external
// linkage would become a weak symbol, and the linker could choose the AVX-512 one for a processor without it.
// GCC and Clang vector extensions serve all levels from one source; only the bfloat16 dot needs intrinsics.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace contrastive_ops {
namespace LEVEL {
namespace {

#define INLINE inline __attribute__((always_inline))

template <class T>
constexpr int kLanes = VECTOR_BYTES / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}
template <class T>
INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}
template <class T>
INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // a difference, because adding 0 is an operation: it turns -0 into 0
}
template <class To, class From>
INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
INLINE T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
INLINE T maximum(T a, T b) {
  return a < b ? b : a;
}
INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// a > b ? a : b, so b where either is NaN. GCC makes two instructions of the expression; x86 has one for it.
template <class T>
INLINE Vec<T> greater(Vec<T> a, Vec<T> b) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
#if VECTOR_BYTES == 64
    return _mm512_maskz_max_ps(0xFFFF, a, b);  // one instruction, too: GCC 12 warns of its own header for the plain one
#elif VECTOR_BYTES == 32
    return _mm256_max_ps(a, b);
#else
    return _mm_max_ps(a, b);
#endif
  }
#endif
  return a > b ? a : b;
}

// The lanes of a, and after them of b, that are numbered: Clang and GCC 12 have one word for it, GCC 11 another.
template <class T, int... From>
INLINE Vec<T> shuffled(Vec<T> a, Vec<T> b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, From...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index>{From...});
#endif
}
// Stores the lanes from First on, half of a vector.
template <int First, class T, size_t... Lane>
INLINE void store_half(T* to, Vec<T> v, std::index_sequence<Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  const auto half = __builtin_shufflevector(v, v, (First + Lane)...);
  memcpy(to, &half, sizeof(half));
#else
  memcpy(to, reinterpret_cast<const T*>(&v) + First, sizeof...(Lane) * sizeof(T));
#endif
}

// Reductions over lanes halve the vector log2(lanes) times.
template <int Step, class T, size_t... Lane>
INLINE Vec<T> rotated(Vec<T> v, std::index_sequence<Lane...>) {
  return shuffled<T, (static_cast<int>(Lane) + Step) % kLanes<T>...>(v, v);
}
template <int Step = kLanes<float> / 2, class T, class Combine>
INLINE Vec<T> across_lanes(Vec<T> v, Combine combine) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>{};
  if constexpr (Step < kLanes<T>) v = combine(v, rotated<Step, T>(v, lanes));
  if constexpr (Step > 1) v = across_lanes<Step / 2, T>(v, combine);
  return v;
}
template <class T>
INLINE T lane_sum(Vec<T> v) {
  return across_lanes<kLanes<float> / 2, T>(v, [](Vec<T> a, Vec<T> b) { return a + b; })[0];
}
template <class T>
INLINE T lane_max(Vec<T> v) {
  return across_lanes<kLanes<float> / 2, T>(v, [](Vec<T> a, Vec<T> b) { return greater<T>(a, b); })[0];
}

// Bit q is set where lane q of a condition is (a comparison of vectors has lanes of 0 and -1).
template <class I>
INLINE unsigned bits_of(Vec<I> condition) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  if constexpr (sizeof(I) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(condition));
  return _mm512_movepi64_mask(bit_cast<__m512i>(condition));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
  if constexpr (sizeof(I) == 4) return _mm256_movemask_ps(bit_cast<__m256>(condition));
  return _mm256_movemask_pd(bit_cast<__m256d>(condition));
#elif defined(__x86_64__)
  if constexpr (sizeof(I) == 4) return _mm_movemask_ps(bit_cast<__m128>(condition));
  return _mm_movemask_pd(bit_cast<__m128d>(condition));
#elif defined(__aarch64__)
  if constexpr (sizeof(I) == 4) return vaddvq_u32(bit_cast<uint32x4_t>(Vec<int32_t>(condition & Vec<I>{1, 2, 4, 8})));
  return static_cast<unsigned>(vaddvq_u64(bit_cast<uint64x2_t>(condition & Vec<I>{1, 2})));
#else
  unsigned bits = 0;
  for (int q = 0; q < kLanes<I>; ++q) bits |= (condition[q] & 1u) << q;
  return bits;
#endif
}
// Bit q is set where a[q] > b[q]; never for NaN.
template <class T>
INLINE unsigned above_bits(Vec<T> a, Vec<T> b) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  // GCC would make a vector of the comparison and bits of the vector.
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GT_OQ);
  return _mm512_cmp_pd_mask(bit_cast<__m512d>(a), bit_cast<__m512d>(b), _CMP_GT_OQ);
#else
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return bits_of<I>(a > b);
#endif
}

// exp with a relative error below 2 units in the last place; 0 below -87.7, inf above 88.4, NaN for NaN.
INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  // In this order of operands a NaN stays. At -88 the power below is 2^-127, whose bits are those of 0.
  const V clamped = -greater<float>(broadcast(-89.0f), -greater<float>(broadcast(-88.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits.
  const V shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  V f = clamped - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  V p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const Vec<int32_t> power = (bit_cast<Vec<int32_t>>(shifted) + (127 - 0x4B400000)) << 23;
  return p * bit_cast<V>(power);
}
INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

// The same of numbers that are not above 0, with a relative error below 2e-7.
INLINE Vec<float> exponential_of_negative(Vec<float> x) {
  using V = Vec<float>;
  const V clamped = greater<float>(broadcast(-88.0f), x);
  const V shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  V f = clamped - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  V p = f * 8.29026565e-3f + 4.18981951e-2f;
  p = p * f + 1.66676384e-1f;
  p = p * f + 4.99991476e-1f;
  p = p * f + 9.99999706e-1f;
  p = p * f + 1.0f;
  const Vec<int32_t> power = (bit_cast<Vec<int32_t>>(shifted) + (127 - 0x4B400000)) << 23;
  return p * bit_cast<V>(power);
}
INLINE Vec<double> exponential_of_negative(Vec<double> x) { return exponential(x); }

INLINE float natural_log(float x) { return logf(x); }
INLINE double natural_log(double x) { return log(x); }

// ---- 16-bit floating types -----------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
// As many 16-bit numbers as a vector holds 32-bit ones.
typedef uint16_t HalfWidth __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE HalfWidth load_half_width(const void* from) {
  HalfWidth v;
  memcpy(&v, from, sizeof(v));
  return v;
}
INLINE Vec<uint32_t> widen(HalfWidth v) { return __builtin_convertvector(v, Vec<uint32_t>); }

// As many bytes as a vector holds 32-bit numbers.
typedef int8_t QuarterWidth __attribute__((vector_size(VECTOR_BYTES / 4)));

INLINE Vec<float> to_float(const float* from) { return load(from); }
INLINE Vec<float> to_float(const int8_t* from) {
  QuarterWidth v;
  memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(__builtin_convertvector(v, Vec<int32_t>), Vec<float>);
}
INLINE Vec<float> to_float(const BFloat16* from) {
  return bit_cast<Vec<float>>(Vec<uint32_t>(widen(load_half_width(from)) << 16));
}
INLINE Vec<float> to_float(const Half* from) {
  const Vec<uint32_t> h = widen(load_half_width(from));
  const Vec<uint32_t> magnitude = (h & 0x7FFFu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormal numbers at the same time.
  const Vec<uint32_t> scaled = bit_cast<Vec<uint32_t>>(Vec<float>(bit_cast<Vec<float>>(magnitude) * 0x1p112f));
  const Vec<uint32_t> special = magnitude >= 0x0F800000u ? Vec<uint32_t>{} + 0x7F800000u : Vec<uint32_t>{};
  return bit_cast<Vec<float>>(Vec<uint32_t>(scaled | special | ((h & 0x8000u) << 16)));
}

// kLanes numbers in the accumulation type.
template <class A, class S>
INLINE Vec<A> to_accumulator(const S* from) {
  if constexpr (sizeof(A) == 8) {
    return load(from);
  } else {
    return to_float(from);
  }
}

// ---- Stores in the type of a tensor ----------------------------------------------------------------------

// kLanes numbers, rounded to the nearest, ties to even; NaN stays NaN, too large becomes inf.
INLINE void store_as(float* to, Vec<float> v) { store(to, v); }
INLINE void store_as(double* to, Vec<double> v) { store(to, v); }
// In integers: the instructions for bfloat16 flush subnormal numbers, and levels would differ.
INLINE void store_as(BFloat16* to, Vec<float> v) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v), magnitude = bits & 0x7FFFFFFFu;
  const Vec<uint32_t> nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet = (bits >> 16) | 0x40u;
  const HalfWidth half = __builtin_convertvector(magnitude > 0x7F800000u ? quiet : nearest, HalfWidth);
  memcpy(to, &half, sizeof(half));
}
INLINE void store_as(Half* to, Vec<float> v) {
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(v), magnitude = bits & 0x7FFFFFFFu;
  const Vec<uint32_t> rebiased = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // The last place of 0.5 is that of a subnormal half, so that the addition rounds to one.
  const Vec<float> shifted = bit_cast<Vec<float>>(magnitude) + 0.5f;
  const Vec<uint32_t> subnormal = bit_cast<Vec<uint32_t>>(shifted) - 0x3F000000u;
  const Vec<uint32_t> infinite = Vec<uint32_t>{} + 0x7C00u, quiet = ((magnitude >> 13) & 0x3FFu) | 0x7E00u;
  Vec<uint32_t> half = magnitude < 0x38800000u ? subnormal : rebiased;
  half = magnitude >= 0x47800000u ? infinite : half;
  half = magnitude > 0x7F800000u ? quiet : half;
  const HalfWidth narrow = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), HalfWidth);
  memcpy(to, &narrow, sizeof(narrow));
}

// ---- Transpose -----------------------------------------------------------------------------------------

// One stage exchanges blocks of `Step` lanes between rows that are `Step` apart.
template <int Step, class T, size_t... Lane>
INLINE void transpose_stage(Vec<T>* rows, std::index_sequence<Lane...>) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & Step) continue;
    const Vec<T> a = rows[i], b = rows[i + Step];
    rows[i] = shuffled<T, static_cast<int>((Lane & Step) ? L + Lane - Step : Lane)...>(a, b);
    rows[i + Step] = shuffled<T, static_cast<int>((Lane & Step) ? L + Lane : Lane + Step)...>(a, b);
  }
}

// A square of kLanes<T> x kLanes<T>; T is an unsigned integer, used as a bag of bits.
template <class T>
INLINE void transpose(Vec<T>* rows) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>{};
  if constexpr (kLanes<T> >= 16) transpose_stage<8, T>(rows, lanes);
  if constexpr (kLanes<T> >= 8) transpose_stage<4, T>(rows, lanes);
  if constexpr (kLanes<T> >= 4) transpose_stage<2, T>(rows, lanes);
  transpose_stage<1, T>(rows, lanes);
}

// ---- Memory --------------------------------------------------------------------------------------------

// Uninitialised scratch on a cache line (scratch.h); throws std::bad_alloc, which pybind11 turns into MemoryError.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { allocate(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { give_scratch(data_); }
  void allocate(int64_t size) {
    give_scratch(data_);
    data_ = static_cast<T*>(take_scratch(static_cast<size_t>(size > 0 ? size : 1) * sizeof(T)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_; }
  // Allocates on first use, so that each thread touches its own scratch first where that is new.
  T* once(int64_t size) {
    if (!data_) allocate(size);
    return data_;
  }

 private:
  T* data_ = nullptr;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
