// Places of float32 numbers in descending order, ties in their own order.
#pragma once

#include <algorithm>

#include "simd.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Returns `keys` or `other`, both of `count` entries: the low half of entry e is the place of the e-th number in order.
// NaN comes last. Keys ascend where the numbers descend, and a stable sort by the number is enough, for many numbers by
// its digits, because places rise.
inline const uint64_t* sort_descending(const float* v, int64_t count, uint64_t* keys, uint64_t* other) {
  for (int64_t e = 0; e < count; ++e) {
    const uint32_t bits = bit_cast<uint32_t>(v[e] + 0.0f);  // -0 and 0 are equal
    const uint32_t rising = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
    const uint32_t falling = v[e] == v[e] ? ~rising : 0xFFFFFFFFu;
    keys[e] = static_cast<uint64_t>(falling) << 32 | static_cast<uint64_t>(e);
  }
  if (count <= 128) {
    std::sort(keys, keys + count, [](uint64_t a, uint64_t b) { return a < b; });
    return keys;
  }
  uint32_t begin[4][256] = {};
  for (int64_t e = 0; e < count; ++e) {
    for (int digit = 0; digit < 4; ++digit) ++begin[digit][keys[e] >> (32 + 8 * digit) & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    const int shift = 32 + 8 * digit;
    uint32_t* at = begin[digit];
    if (at[keys[0] >> shift & 255] == count) continue;  // of one size, as scores are: the exponent tells nothing
    uint32_t before = 0;
    for (int d = 0; d < 256; ++d) {
      const uint32_t here = at[d];
      at[d] = before;
      before += here;
    }
    for (int64_t e = 0; e < count; ++e) other[at[keys[e] >> shift & 255]++] = keys[e];
    uint64_t* sorted = other;
    other = keys;
    keys = sorted;
  }
  return keys;
}

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
