// What a tile that is folded leaves of its logits where they are kept; see kept.h.
#pragma once

#include "../similarity_folds.h"
#include "rules.h"

namespace contrastive_ops::hopper {

// The most that logits of a warp lie apart, times log2(e): 64, so that one is off by at most 2^-11.
constexpr float kKeptRange = 64.0f * kLog2E;

struct KeptLogits {
  uint16_t* logits;  // (rows, pitch); null for none
  Part* heads;       // (row tiles, tiles across, warps)
  int64_t* wide;     // (pairs of row tiles)
  int64_t pitch;
  int col_tiles;
};

// Logits as 16-bit fixed point below the largest of the warp, and -inf as 65535; see kept.h. Adding 1.5 * 2^23 rounds
// to an integer, which is in the lower bits.
template <int kCols>
__device__ void keep_logits(const SweepPairs& p, const KeptLogits& to, const Own<kCols>& own, const TilePlace& tile,
                            float (&sums)[2][kCols / 2], float top, float low) {
  constexpr float kRound = 12582912.0f;
  const float range = low < top ? top - low : 0.0f, inverse = range > 0.0f ? 65534.0f / range : 0.0f;
  bool fits = top < kInfinity && range <= kKeptRange;
  CONTRASTIVE_OPS_UNROLL
  for (int r = 0; r < 4; ++r) {
    const int row = own.row_of(r);
    fits = fits && p.factor(row) != 0.0f;
    uint16_t* line = to.logits + int64_t{row} * to.pitch;
    CONTRASTIVE_OPS_UNROLL
    for (int c = 0; c < Own<kCols>::kColumns; c += 2) {
      uint32_t words[2];
      CONTRASTIVE_OPS_UNROLL
      for (int q = 0; q < 2; ++q) {
        const float z = Own<kCols>::number(sums, r, c + q);
        fits = fits && z == z;
        words[q] = __float_as_uint(fminf((top - z) * inverse, 65535.0f) + kRound) & 0xffff;
      }
      const int col = own.col_of(c);
      if (row < p.rows && col < to.pitch) *reinterpret_cast<uint32_t*>(line + col) = words[1] << 16 | words[0];
    }
  }
  const int warp = static_cast<int>(threadIdx.x) % kGroup / kWarp;
  fits = __all_sync(kFullWarp, fits);
  if (threadIdx.x % kWarp != 0) return;
  to.heads[(int64_t{tile.row_tile} * to.col_tiles + tile.col_tile) * (kGroup / kWarp) + warp] = {
      {top, range / 65534.0f}};
  if (!fits) atomicMax(reinterpret_cast<long long*>(to.wide + tile.row_tile / kCluster), 1LL);
}

}  // namespace contrastive_ops::hopper
