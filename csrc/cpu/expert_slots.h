// Places for the choices of a router: which are kept, and the row of each.
#pragma once

#include <algorithm>

#include "../expert_routing.h"
#include "radix_sort.h"
#include "similarity_tile.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// At most 64 parts, so that the sums of many segments need no more memory than that; whole blocks on every level.
INLINE int64_t tokens_of_part(int64_t tokens) { return round_up(maximum<int64_t>(1024, (tokens + 63) / 64), 64); }

// The tokens of a group in the order in which they choose.
template <class A>
const uint64_t* turns(const A* priority, int64_t count, uint64_t* keys, uint64_t* other) {
  if constexpr (sizeof(A) == 4) {
    return sort_descending(priority, count, keys, other);
  } else {
    for (int64_t e = 0; e < count; ++e) keys[e] = static_cast<uint64_t>(e);
    // Not std::stable_sort, part of which has external linkage; equal numbers are told apart by their places.
    std::sort(keys, keys + count, [priority](uint64_t a, uint64_t b) {
      const A p = priority[a], q = priority[b];
      if (p != p || q != q) return p == p || (q != q && a < b);
      return p > q || (p == q && a < b);
    });
    return keys;
  }
}

// Tokens are counted, listed and given their rows in parts, each of one group. Choices of an expert that has room for
// all of them need no order, so only those of the others are listed, and in the padded layout, where places follow it.
//
// Until rows are given, a slot is -1 for a dropped choice, and otherwise the choice's position in its expert's part of
// the group in the padded layout, or 0.
class SlotPlan {
 public:
  SlotPlan(const RouterSlots& s, const Parallel& parallel)
      : s_(s),
        parallel_(parallel),
        limited_(s.capacity >= 0),
        groups_(s.group_size ? s.T / s.group_size : 1),
        lists_(s.E * s.k),
        step_(tokens_of_part(s.group_size)),
        parts_of_group_((s.group_size + step_ - 1) / step_) {}

  void run() {
    if (limited_) count();
    if (limited_ && find_lists()) {
      fill_lists();
      s_.dtype == DType::float64 ? decide<double>() : decide<float>();
    }
    lay_out();
  }

 private:
  // Choices of each expert as the first, second, ... of a token: (parts, E, k).
  void count() {
    next_.allocate(groups_ * parts_of_group_ * lists_);
    auto task = [this](int64_t part, int) {
      int64_t* counts = next_.get() + part * lists_;
      std::fill(counts, counts + lists_, 0);
      const int64_t k = s_.k;
      const auto [begin, end] = tokens_of(part);
      const int64_t* experts = s_.experts;
      int64_t* slots = s_.slots;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < k; ++j) {
          const int64_t expert = experts[t * k + j];
          slots[t * k + j] = expert < 0 ? -1 : 0;
          if (expert >= 0) ++counts[expert * k + j];
        }
      }
    };
    run_parallel(parallel_.run, groups_ * parts_of_group_, task);
  }

  // Where each list begins, and in it the choices of each part; false where no expert needs one.
  bool find_lists() {
    begin_.allocate(groups_ * lists_ + 1);
    Buffer<int64_t> next(lists_);  // of a list; below 0 where its expert needs none
    int64_t before = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      int64_t *counts = next_.get() + group * parts_of_group_ * lists_, *begin = begin_.get() + group * lists_;
      std::fill(begin, begin + lists_, 0);
      for (int64_t part = 0; part < parts_of_group_; ++part) {
        for (int64_t list = 0; list < lists_; ++list) begin[list] += counts[part * lists_ + list];
      }
      for (int64_t first = 0; first < lists_; first += s_.k) {
        int64_t wanted = 0;
        for (int64_t j = 0; j < s_.k; ++j) wanted += begin[first + j];
        const bool listed = s_.padded || wanted > s_.capacity;
        for (int64_t list = first; list < first + s_.k; ++list) {
          const int64_t here = begin[list];
          begin[list] = before;
          next.get()[list] = listed ? before : -1;
          if (listed) before += here;
        }
      }
      for (int64_t part = 0; part < parts_of_group_; ++part) {
        for (int64_t list = 0; list < lists_; ++list) {
          int64_t &at = counts[part * lists_ + list], &to = next.get()[list];
          const int64_t here = at;
          at = to;
          if (to >= 0) to += here;
        }
      }
    }
    begin_.get()[groups_ * lists_] = before;
    return before > 0;
  }

  // Tokens of a group, in order, in the lists of their choices.
  void fill_lists() {
    members_.allocate(begin_.get()[groups_ * lists_]);
    auto task = [this](int64_t part, int) {
      const int64_t k = s_.k, first = part / parts_of_group_ * s_.group_size, *experts = s_.experts;
      int64_t* next = next_.get() + part * lists_;
      uint32_t* members = members_.get();
      const auto [begin, end] = tokens_of(part);
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < k; ++j) {
          const int64_t expert = experts[t * k + j];
          if (expert < 0 || next[expert * k + j] < 0) continue;
          members[next[expert * k + j]++] = static_cast<uint32_t>(t - first);
        }
      }
    };
    run_parallel(parallel_.run, groups_ * parts_of_group_, task);
  }

  // All first choices before second ones, each in the order of the tokens' priorities. Experts do not wait for each
  // other, and their lists are sorted in a small cache.
  template <class A>
  void decide() {
    auto task = [this](int64_t of, int) {
      const int64_t k = s_.k, first = of / s_.E * s_.group_size;
      const A* priority = s_.priority ? static_cast<const A*>(s_.priority) + first : nullptr;
      Buffer<A> values;
      Buffer<uint64_t> keys;
      int64_t room = s_.capacity;
      for (int64_t j = 0; j < k; ++j) {
        const int64_t begin = begin_.get()[of * k + j], count = begin_.get()[of * k + j + 1] - begin;
        const uint32_t* tokens = members_.get() + begin;
        const uint64_t* turn = nullptr;
        if (priority && room > 0 && (s_.padded ? count > 0 : count > room)) {
          values.allocate(count);
          keys.allocate(2 * count);
          for (int64_t e = 0; e < count; ++e) values.get()[e] = priority[tokens[e]];
          turn = turns(static_cast<const A*>(values.get()), count, keys.get(), keys.get() + count);
        }
        for (int64_t e = s_.padded ? 0 : minimum(room, count); e < count; ++e) {
          const int64_t token = first + tokens[turn ? turn[e] & 0xFFFFFFFFu : static_cast<uint64_t>(e)];
          s_.slots[token * k + j] = e < room ? s_.capacity - room + e : -1;
        }
        room = maximum<int64_t>(0, room - count);
      }
    };
    run_parallel(parallel_.run, groups_ * s_.E, task);
  }

  // Rows of what is kept: those of an expert follow each other in the order of choices, or by position where padded.
  void lay_out() {
    const int64_t step = tokens_of_part(s_.T), parts = (s_.T + step - 1) / step, cells = s_.segments * s_.E;
    Buffer<int64_t> kept(parts * cells), next(parts * s_.E);
    auto count = [&](int64_t part, int) {
      int64_t* here = kept.get() + part * cells;
      std::fill(here, here + cells, 0);
      if (s_.padded) clear_rows(0, part, parts);
      const int64_t k = s_.k, *experts = s_.experts;
      int64_t* slots = s_.slots;
      for (int64_t t = part * step; t < minimum(s_.T, (part + 1) * step); ++t) {
        int64_t* of_segment = here + (s_.segment ? s_.segment[t] : 0) * s_.E;
        for (int64_t c = t * k; c < (t + 1) * k; ++c) {
          if (!limited_) slots[c] = experts[c] < 0 ? -1 : 0;  // nothing has been dropped
          if (slots[c] >= 0) ++of_segment[experts[c]];
        }
      }
    };
    run_parallel(parallel_.run, parts, count);
    std::fill(s_.kept, s_.kept + cells, 0);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t cell = 0; cell < cells; ++cell) s_.kept[cell] += kept.get()[part * cells + cell];
    }
    Buffer<int64_t> first(s_.E);  // row of each expert's choices in a part
    int64_t row = 0;
    for (int64_t e = 0; e < s_.E; ++e) {
      s_.offsets[e] = first.get()[e] = row;
      for (int64_t cell = e; cell < cells && !s_.padded; cell += s_.E) row += s_.kept[cell];
      if (s_.padded) row += groups_ * s_.capacity;
    }
    s_.offsets[s_.E] = row;
    for (int64_t part = 0; part < parts; ++part) {
      std::copy(first.get(), first.get() + s_.E, next.get() + part * s_.E);
      for (int64_t cell = 0; cell < cells && !s_.padded; cell += s_.E) {
        for (int64_t e = 0; e < s_.E; ++e) first.get()[e] += kept.get()[part * cells + cell + e];
      }
    }
    if (parts == 0) clear_rows(0, 0, 1);
    auto place = [&](int64_t part, int) {
      const int64_t k = s_.k, *experts = s_.experts;
      int64_t *slots = s_.slots, *order = s_.order, *to = next.get() + part * s_.E;
      if (!s_.padded) clear_rows(row, part, parts);  // without gaps, rows are only empty behind the last expert
      for (int64_t t = part * step; t < minimum(s_.T, (part + 1) * step); ++t) {
        const int64_t group = s_.padded ? t / s_.group_size * s_.capacity : 0;
        for (int64_t c = t * k; c < (t + 1) * k; ++c) {
          if (slots[c] < 0) continue;
          slots[c] = s_.padded ? to[experts[c]] + group + slots[c] : to[experts[c]]++;
          order[slots[c]] = c;
        }
      }
    };
    run_parallel(parallel_.run, parts, place);
  }

  // A part of the rows from `begin` on is empty.
  void clear_rows(int64_t begin, int64_t part, int64_t parts) {
    const int64_t count = s_.rows - begin;
    std::fill(s_.order + begin + part * count / parts, s_.order + begin + (part + 1) * count / parts, -1);
  }
  std::pair<int64_t, int64_t> tokens_of(int64_t part) const {
    const int64_t group = part / parts_of_group_, begin = group * s_.group_size + part % parts_of_group_ * step_;
    return {begin, minimum(begin + step_, (group + 1) * s_.group_size)};
  }

  const RouterSlots& s_;
  const Parallel& parallel_;
  const bool limited_;
  const int64_t groups_, lists_, step_, parts_of_group_;
  Buffer<int64_t> next_, begin_;  // (parts, E, k); (groups, E, k), and the end
  Buffer<uint32_t> members_;
};

void router_slots(const RouterSlots& s, const Parallel& parallel) { SlotPlan(s, parallel).run(); }

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
