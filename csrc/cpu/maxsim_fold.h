// From tiles of inner products to the best tokens of documents: what a sweep over document tokens does with a tile.
//
// A row of a tile is a document token, a lane a query token. A document's rows are folded lane by lane, so nothing is
// ever combined across lanes.
#pragma once

#include "../maxsim.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

// Places are folded next to numbers, in lanes of the same width.
template <class A>
using PlaceOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// Memory that grows and is not kept.
template <class T>
class Growing {
 public:
  T* at_least(int64_t size) {
    if (size > size_) buffer_.allocate(size_ = maximum(size, 2 * size_));
    return buffer_.get();
  }
  T* get() const { return buffer_.get(); }

 private:
  Buffer<T> buffer_;
  int64_t size_ = 0;
};

// Rows of one document in a chunk. A document that is longer than a chunk has several segments in a row.
struct Segment {
  int64_t score, winner;  // where the first query's score and the first token's winner go
  int64_t begin, end;     // rows of the chunk
  int64_t before;         // rows of this document in earlier chunks
  bool last;              // whether the document ends with it
};

// Whether the lanes of c come before those of e, which are earlier tokens: larger, or NaN where e is a number.
template <class A>
INLINE Vec<PlaceOf<A>> comes_before(Vec<A> c, Vec<A> e) {
  return ~(c <= e) & (e == e);
}
template <class A>
INLINE bool comes_before(A c, A e) {
  return c > e || (c != c && e == e);
}

// The best row of a segment in every lane of one panel of query tokens.
template <class A>
struct Best {
  static constexpr int W = kLanes<A>;
  using Place = PlaceOf<A>;
  Vec<A> value[kVectors];
  Vec<Place> place[kVectors];

  INLINE void load_from(const A* values, const Place* places) {
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load(values + v * W);
      place[v] = load(places + v * W);
    }
  }
  INLINE void store_to(A* values, Place* places) const {
    for (int v = 0; v < kVectors; ++v) {
      store(values + v * W, value[v]);
      store(places + v * W, place[v]);
    }
  }

  // `dots`: (rows, kVectors * W), `places`: that of each row in its document. `fresh`: the document begins here.
  // NaN is seldom and costs two more instructions a vector; it is looked for on the way and folded again.
  INLINE void add(const A* dots, const int32_t* places, int64_t rows, bool fresh) {
    Best next = *this;
    int64_t r = 0;
    if (fresh) next.begin_with(dots, places[r++]);
    Vec<Place> unordered[kVectors] = {};
    for (; r < rows; ++r) {
      const Vec<Place> at = broadcast(static_cast<Place>(places[r]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> c = load(dots + r * kVectors * W + v * W);
        next.place[v] = c > next.value[v] ? at : next.place[v];
        next.value[v] = greater<A>(c, next.value[v]);  // keeps a NaN that it holds
        unordered[v] |= c != c;
      }
    }
    unsigned any = 0;
    for (int v = 0; v < kVectors; ++v) any |= bits_of<Place>(unordered[v]);
    if (any) return add_with_nan(dots, places, rows, fresh);
    *this = next;
  }

 private:
  INLINE void begin_with(const A* dots, int32_t at) {
    for (int v = 0; v < kVectors; ++v) {
      value[v] = load(dots + v * W);
      place[v] = broadcast(static_cast<Place>(at));
    }
  }
  void add_with_nan(const A* dots, const int32_t* places, int64_t rows, bool fresh) {
    int64_t r = 0;
    if (fresh) begin_with(dots, places[r++]);
    for (; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> c = load(dots + r * kVectors * W + v * W);
        const Vec<Place> take = comes_before<A>(c, value[v]);
        value[v] = take ? c : value[v];
        place[v] = take ? broadcast(static_cast<Place>(places[r])) : place[v];
      }
    }
  }
};

// The k best rows so far of one lane, in order.
template <class A>
struct BestFew {
  A* values;  // (k,)
  int32_t* places;
  int64_t k;

  // `held` are there; where that is k, c comes before the last of them.
  void insert(A c, int32_t place, int64_t held) const {
    int64_t at = minimum(held, k - 1);
    for (; at > 0 && comes_before(c, values[at - 1]); --at) {
      values[at] = values[at - 1];
      places[at] = places[at - 1];
    }
    values[at] = c;
    places[at] = place;
  }
};

// Adds the rows of a segment to the lists of kCount lanes, which lie k apart.
template <class A, int kCount>
void add_to_lists(const A* dots, const int32_t* places, int64_t rows, int64_t before, A* values, int32_t* list_places,
                  int64_t k) {
  constexpr int W = kLanes<A>;
  const auto list = [&](int lane) { return BestFew<A>{values + lane * k, list_places + lane * k, k}; };
  alignas(64) A last[kCount];
  int64_t r = 0;
  for (; r < rows && before + r < k; ++r) {
    for (int lane = 0; lane < kCount; ++lane) list(lane).insert(dots[r * kCount + lane], places[r], before + r);
  }
  for (int lane = 0; lane < kCount; ++lane) last[lane] = values[lane * k + k - 1];
  for (; r < rows; ++r) {
    for (int v = 0; v < kCount / W; ++v) {
      unsigned bits = bits_of<PlaceOf<A>>(comes_before<A>(load(dots + r * kCount + v * W), load(last + v * W)));
      for (; bits; bits &= bits - 1) {
        const int lane = v * W + __builtin_ctz(bits);
        list(lane).insert(dots[r * kCount + lane], places[r], k);
        last[lane] = values[lane * k + k - 1];
      }
    }
  }
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
