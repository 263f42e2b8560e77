// The k best of many rows, column by column: who may still be among them, and their order.
//
// Columns come in ascending order, so an equal logit that comes later is worse, and one comparison with the row's
// threshold decides. A row keeps a few more entries than k; when they are full, those that cannot be among the k best
// are dropped and the threshold rises.
//
// Algorithms of the standard library are given lambdas, whose type makes the function one of this file: the linker
// could choose a shared instance for a processor without its instructions.
#pragma once

#include <algorithm>

#include "radix_sort.h"
#include "similarity_pairs.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Calls body(q) for each bit that is set.
template <class Body>
INLINE void for_each_bit(unsigned bits, Body body) {
  for (; bits; bits &= bits - 1) body(__builtin_ctz(bits));
}

#if defined(__aarch64__)
// For each set of lanes, the bytes of its lanes one after another: what a table look-up takes. The rest is the first.
template <class A>
struct CompressBytes {
  constexpr CompressBytes() {
    for (int bits = 0; bits < (1 << kLanes<A>); ++bits) {
      size_t at = 0;
      for (size_t q = 0; q < kLanes<A>; ++q) {
        if ((bits >> q) & 1) {
          for (size_t byte = 0; byte < sizeof(A); ++byte) of[bits][at++] = static_cast<uint8_t>(q * sizeof(A) + byte);
        }
      }
    }
  }
  alignas(16) uint8_t of[1 << kLanes<A>][16] = {};
};
template <class A>
constexpr CompressBytes<A> kCompressBytes{};
#endif

// Writes the lanes whose bit is set one after another; what follows them, up to a whole vector, is garbage.
template <class A>
INLINE void compress(A* values, Id<A>* columns, Vec<A> value, Vec<Id<A>> column, unsigned bits) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
  // In a register and then stored: compressing into memory is slow on some processors.
  if constexpr (sizeof(A) == 4) {
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(bits, bit_cast<__m512>(value)));
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(bits, bit_cast<__m512i>(column)));
  } else {
    _mm512_storeu_pd(values, _mm512_maskz_compress_pd(bits, bit_cast<__m512d>(value)));
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi64(bits, bit_cast<__m512i>(column)));
  }
#elif defined(__aarch64__)
  const uint8x16_t bytes = vld1q_u8(kCompressBytes<A>.of[bits]);
  store(values, bit_cast<Vec<A>>(vqtbl1q_u8(bit_cast<uint8x16_t>(value), bytes)));
  store(columns, bit_cast<Vec<Id<A>>>(vqtbl1q_u8(bit_cast<uint8x16_t>(column), bytes)));
#else
  int64_t at = 0;
  for_each_bit(bits, [&](int q) {
    values[at] = value[q];
    columns[at++] = column[q];
  });
#endif
}

template <class A>
class Selection {
 public:
  // Entries beyond k that a row holds before it is shrunk: few for small k, whose threshold should rise soon, many for
  // large k, where shrinking costs more.
  static int64_t capacity(int64_t k) { return k + minimum<int64_t>(maximum<int64_t>(k, 64), 4096); }
  static int64_t bytes_of_a_row(int64_t k) { return stride(k) * (sizeof(A) + sizeof(Id<A>)); }

  void start(int64_t rows, int64_t k, const A* floor) {
    k_ = k;
    capacity_ = capacity(k);
    stride_ = stride(k);
    if (rows > allocated_ || stride_ != allocated_stride_) {
      values_.allocate(rows * stride_);
      columns_.allocate(rows * stride_);
      counts_.allocate(rows);
      thresholds_.allocate(rows);
      scratch_.allocate(stride_);
      keys_.allocate(2 * stride_);
      allocated_ = rows;
      allocated_stride_ = stride_;
    }
    for (int64_t i = 0; i < rows; ++i) {
      counts_.get()[i] = 0;
      thresholds_.get()[i] = floor ? floor[i] : -infinity<A>();
    }
  }

  // Long lists of many rows are in no near cache: asks for the place where the next entries of a row go.
  INLINE void prefetch(int64_t i) {
    const int64_t count = counts_.get()[i];
    __builtin_prefetch(values(i) + count, 1);
    __builtin_prefetch(columns(i) + count, 1);
  }

  // Numbers below `least` are of no interest; equal ones are.
  void begin_at(int64_t i, A least) {
    A& threshold = thresholds_.get()[i];
    if (least - least == 0 && least > threshold) threshold = next_below(least);
  }
  A threshold(int64_t i) const { return thresholds_.get()[i]; }

  // Adds the lanes whose bit is set, all above the threshold; lane 0 is column `first`.
  INLINE void add(int64_t i, Vec<A> value, Id<A> first, unsigned bits) {
    int64_t& count = counts_.get()[i];
    compress<A>(values(i) + count, columns(i) + count, value, lane_numbers<A>() + first, bits);
    count += __builtin_popcount(bits);
    if (count > capacity_) shrink(i);
  }

  // Writes those of a row that may be among the k best, k at most, and returns how many they are; in order of columns.
  int64_t take(int64_t i, A* out_values, Id<A>* out_columns) {
    if (counts_.get()[i] > k_) keep_exactly(i);
    const int64_t count = counts_.get()[i];
    memcpy(out_values, values(i), static_cast<size_t>(count) * sizeof(A));
    memcpy(out_columns, columns(i), static_cast<size_t>(count) * sizeof(Id<A>));
    return count;
  }

  // Writes the k best in order; `base` is the number of column 0.
  void finish(int64_t i, A* out_values, int64_t* out_columns, int64_t base) {
    // Sorting an entry costs ten times what dropping it does.
    if (counts_.get()[i] > k_ + (capacity_ - k_) / 4) shrink(i);
    const int64_t count = counts_.get()[i], found = minimum(count, k_);
    if constexpr (sizeof(A) == 4) {
      const uint64_t* sorted = sort_descending(values(i), count, keys_.get(), keys_.get() + stride_);
      for (int64_t e = 0; e < found; ++e) {
        const int64_t from = static_cast<uint32_t>(sorted[e]);
        out_values[e] = values(i)[from];
        out_columns[e] = base + columns(i)[from];
      }
    } else {
      uint64_t* order = keys_.get();
      for (int64_t e = 0; e < count; ++e) order[e] = static_cast<uint64_t>(e);
      const A* v = values(i);
      std::sort(order, order + count, [v](uint64_t a, uint64_t b) { return v[a] > v[b] || (v[a] == v[b] && a < b); });
      for (int64_t e = 0; e < found; ++e) {
        out_values[e] = v[order[e]];
        out_columns[e] = base + columns(i)[order[e]];
      }
    }
    for (int64_t e = found; e < k_; ++e) {
      out_values[e] = -infinity<A>();
      out_columns[e] = -1;
    }
  }

 private:
  static constexpr int kSamples = 32;

  static float next_below(float number) { return nextafterf(number, -infinity<float>()); }
  static double next_below(double number) { return nextafter(number, -infinity<double>()); }

  // Entries from one row to the next: a full list takes one more vector, and is read in whole vectors.
  static int64_t stride(int64_t k) { return round_up(capacity(k) + kLanes<A>, kLanes<A>); }

  A* values(int64_t i) { return values_.get() + i * stride_; }
  Id<A>* columns(int64_t i) { return columns_.get() + i * stride_; }

  // Calls body(vector, bits of its entries) for all entries of a row.
  template <class Body>
  static INLINE void for_each_vector(const A* values, int64_t count, Body body) {
    constexpr int W = kLanes<A>;
    for (int64_t e = 0; e < count; e += W) {
      constexpr unsigned all = (1u << W) - 1;
      body(e, count - e >= W ? all : all >> (W - (count - e)));
    }
  }
  static int64_t count_from(const A* values, int64_t count, A pivot) {
    int64_t found = 0;
    for_each_vector(values, count, [&](int64_t e, unsigned inside) {
      found += __builtin_popcount(inside & ~above_bits<A>(broadcast(pivot), load(values + e)));
    });
    return found;
  }

  // Leaves the k best and perhaps some more, in their order.
  __attribute__((noinline)) void shrink(int64_t i) {
    A* v = values(i);
    Id<A>* c = columns(i);
    int64_t& count = counts_.get()[i];
    A pivot;
    if (!find_pivot(v, count, pivot)) return keep_exactly(i);
    int64_t kept = 0;
    for_each_vector(v, count, [&](int64_t e, unsigned inside) {
      const Vec<A> value = load(v + e);
      const Vec<Id<A>> column = load(c + e);
      const unsigned bits = inside & ~above_bits<A>(broadcast(pivot), value);
      compress<A>(v + kept, c + kept, value, column, bits);
      kept += __builtin_popcount(bits);
    });
    count = kept;
    thresholds_.get()[i] = pivot;
  }

  // A number that at least k entries reach, and few more: three times cheaper than the k-th largest itself.
  bool find_pivot(const A* v, int64_t count, A& pivot) const {
    if (count < 3 * kSamples) return false;
    A samples[kSamples];
    for (int s = 0; s < kSamples; ++s) samples[s] = v[(2 * s + 1) * count / (2 * kSamples)];
    std::sort(samples, samples + kSamples, [](A a, A b) { return a > b; });
    const int64_t slack = capacity_ - k_, enough = k_ + slack / 2;
    int at = static_cast<int>(minimum<int64_t>((k_ + slack / 4) * kSamples / count, kSamples - 1));
    int64_t reached = count_from(v, count, samples[at]);
    while (reached < k_ && at + 1 < kSamples) reached = count_from(v, count, samples[++at]);
    while (reached > enough && at > 0) {
      const int64_t fewer = count_from(v, count, samples[at - 1]);
      if (fewer < k_) break;
      reached = fewer;
      --at;
    }
    pivot = samples[at];
    return reached >= k_ && reached <= count - slack / 4;
  }

  // Of equal entries the first ones stay.
  void keep_exactly(int64_t i) {
    A *v = values(i), *copy = scratch_.get();
    Id<A>* c = columns(i);
    int64_t& count = counts_.get()[i];
    memcpy(copy, v, static_cast<size_t>(count) * sizeof(A));
    std::nth_element(copy, copy + k_ - 1, copy + count, [](A a, A b) { return a > b; });
    const A last = copy[k_ - 1];
    int64_t ties = k_;
    for (int64_t e = 0; e < count; ++e) ties -= v[e] > last;
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {
      if (!(v[e] > last) && (v[e] < last || --ties < 0)) continue;
      v[kept] = v[e];
      c[kept++] = c[e];
    }
    count = kept;
    thresholds_.get()[i] = last;
  }

  int64_t k_ = 0, capacity_ = 0, stride_ = 0, allocated_ = 0, allocated_stride_ = 0;
  Buffer<A> values_, thresholds_, scratch_;
  Buffer<Id<A>> columns_;
  Buffer<int64_t> counts_;
  Buffer<uint64_t> keys_;
};

// Entries of one row from several lists, in any order.
template <class A>
class Gathered {
 public:
  void start(int64_t most) {
    if (most > allocated_) {
      values_.allocate(most);
      columns_.allocate(most);
      copy_.allocate(most);
      keys_.allocate(2 * most);
      allocated_ = most;
    }
    count_ = with_column_ = 0;
  }
  void add(const A* values, int64_t count) {
    memcpy(values_.get() + count_, values, static_cast<size_t>(count) * sizeof(A));
    count_ += count;
  }
  // Of the entries in the order that they were added in.
  void add_column(int64_t column) { columns_.get()[with_column_++] = column; }

  // What the k best of the entries reach; -inf where they are fewer.
  A reached(int64_t k) {
    if (count_ < k) return -infinity<A>();
    A* copy = copy_.get();
    memcpy(copy, values_.get(), static_cast<size_t>(count_) * sizeof(A));
    std::nth_element(copy, copy + k - 1, copy + count_, [](A a, A b) { return a > b; });
    return copy[k - 1];
  }

  // Writes the k best in order.
  void finish(int64_t k, A* out_values, int64_t* out_columns) {
    const A least = reached(k);
    A* values = values_.get();
    int64_t *columns = columns_.get(), kept = 0;
    for (int64_t e = 0; e < count_; ++e) {
      if (values[e] < least) continue;
      values[kept] = values[e];
      columns[kept++] = columns[e];
    }
    const uint64_t* order = sorted(kept);
    for (int64_t e = 0; e < k; ++e) {
      const uint64_t from = e < kept ? static_cast<uint32_t>(order[e]) : 0;
      out_values[e] = e < kept ? values[from] : -infinity<A>();
      out_columns[e] = e < kept ? columns[from] : -1;
    }
  }

 private:
  // Places of the first `count` entries in their order, in the low halves: by values, equal ones by columns.
  const uint64_t* sorted(int64_t count) {
    const A* v = values_.get();
    const int64_t* c = columns_.get();
    uint64_t* keys = keys_.get();
    if constexpr (sizeof(A) == 4) {
      keys = const_cast<uint64_t*>(sort_descending(v, count, keys, keys + allocated_));
      const auto by_column = [c](uint64_t a, uint64_t b) {
        return c[static_cast<uint32_t>(a)] < c[static_cast<uint32_t>(b)];
      };
      const auto value = [&](int64_t e) { return v[static_cast<uint32_t>(keys[e])]; };
      for (int64_t begin = 0, end = 1; begin < count; begin = end++) {
        while (end < count && value(end) == value(begin)) ++end;
        if (end - begin > 1) std::sort(keys + begin, keys + end, by_column);
      }
    } else {
      for (int64_t e = 0; e < count; ++e) keys[e] = static_cast<uint64_t>(e);
      std::sort(keys, keys + count,
                [v, c](uint64_t a, uint64_t b) { return v[a] > v[b] || (v[a] == v[b] && c[a] < c[b]); });
    }
    return keys;
  }

  Buffer<A> values_, copy_;
  Buffer<int64_t> columns_;
  Buffer<uint64_t> keys_;
  int64_t count_ = 0, with_column_ = 0, allocated_ = 0;
};

// The k best of two lists in order, each padded with -1.
template <class A>
void merge_lists(const A* values, const int64_t* indices, int64_t size, const A* other_values,
                 const int64_t* other_indices, int64_t other_size, int64_t k, A* out_values, int64_t* out_indices) {
  int64_t a = 0, b = 0;
  for (int64_t e = 0; e < k; ++e) {
    const bool has_a = a < size && indices[a] >= 0, has_b = b < other_size && other_indices[b] >= 0;
    if (!has_a && !has_b) {
      out_values[e] = -infinity<A>();
      out_indices[e] = -1;
      continue;
    }
    const bool first =
        !has_b ||
        (has_a && (values[a] > other_values[b] || (values[a] == other_values[b] && indices[a] < other_indices[b])));
    out_values[e] = first ? values[a] : other_values[b];
    out_indices[e] = first ? indices[a++] : other_indices[b++];
  }
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
