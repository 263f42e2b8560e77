// How a similarity matrix is cut: chunks of rows, which follow one another, and tiles of a chunk, which are tasks.
//
// Sizes depend on the problem alone, and parts are merged in the order of tiles, so that results are bitwise the same
// for any number of threads.
#pragma once

#include "similarity_folds.h"

namespace contrastive_ops {
namespace LEVEL {
namespace {

// Rows of a chunk that is taken whole by whoever follows the tiles, and rows of a band.
constexpr int64_t kChunkRows = 512;
// Rows of a chunk whose weights are kept between two regions.
constexpr int64_t kWeightRows = 1024;
// Inner products that a chunk keeps between its fold and its gradients: bounds the rows of a chunk.
constexpr int64_t kChunkElements = int64_t{16} << 20;
// Packed rows of one side that are kept at a time: 32 MiB.
constexpr int64_t kPanelBytes = int64_t{32} << 20;
// Parts of one fold that a chunk keeps until they are merged: 2 MiB of float32 logsumexps.
constexpr int64_t kParts = int64_t{1} << 18;

struct Chunk {
  int64_t begin, rows;             // rows of x
  int64_t j_begin, j_end;          // columns: from the diagonal on for self-similarity
  int64_t block_columns = kBlock;  // of each block but the last
  int64_t blocks() const { return (j_end - j_begin + block_columns - 1) / block_columns; }
};

// A tile: rows of a chunk and a block of its columns.
struct Block {
  int64_t index, j, cols;  // of the columns
  int64_t rows;            // that this block needs
  int64_t mirrored;        // of them, those that also stand for the element below the diagonal
  int64_t i = 0, row = 0;  // the first row: in the matrix, in the chunk
  int64_t tile = 0;        // its number among those of its columns
};

// What follows the tiles of a chunk.
enum class Use {
  folds,      // nothing but merges: as many rows as parts and packed rows leave room for
  gradients,  // weights of the chunk are kept
  total,      // inner products and weights of the chunk are kept
  chunk,      // folds that take all rows of a chunk from one task
  softmax     // the same, and inner products are kept
};

inline bool is_tall(Use use) { return use == Use::chunk || use == Use::softmax; }

// Few columns make narrow blocks, so that there are enough for more than a few threads.
inline int64_t columns_of_a_block(int64_t columns) { return columns <= 128 ? 32 : columns <= 256 ? 64 : kBlock; }

inline int64_t blocks_of(int64_t columns) {
  const int64_t width = columns_of_a_block(columns);
  return (columns + width - 1) / width;
}

// Rows of a tile, if the rows of y are packed once for all tiles. A few rows are one tile where columns alone make
// enough of them.
inline int64_t rows_of_a_tile(int64_t rows, int64_t columns) {
  if (columns >= 16 * kBlock || rows > 1024) return kBlock;
  return rows <= 128 ? 32 : 64;
}

struct Cuts {
  int64_t chunk_rows, tile_rows, block_columns;
  bool shares_y;  // whether all rows of y are packed once, and not those of a block by each tile

  // `group`: what rows are rounded up to; `row_bytes`: of a packed row.
  Cuts(const SimilarityProblem& p, Use use, int64_t group, int64_t row_bytes) {
    const int64_t N = maximum<int64_t>(p.N, 1), M = maximum<int64_t>(p.M, 1), blocks = blocks_of(M);
    block_columns = columns_of_a_block(M);
    tile_rows = rows_of_a_tile(N, M);
    shares_y = !is_tall(use) && N > tile_rows && M * row_bytes <= kPanelBytes;
    if (!shares_y && N > tile_rows) tile_rows = blocks >= 128 ? 4 * kBlock : blocks >= 64 ? 2 * kBlock : kBlock;
    chunk_rows = use == Use::gradients || use == Use::total ? kWeightRows : kChunkRows;
    if (use == Use::folds) {
      const int64_t fits = minimum(kPanelBytes / maximum<int64_t>(row_bytes, 1), kParts / blocks);
      chunk_rows = maximum(fits / kChunkRows, int64_t{1}) * kChunkRows;
    }
    if (use == Use::total || use == Use::softmax) {
      while (chunk_rows > kBlock && chunk_rows * M > kChunkElements) chunk_rows /= 2;
    }
    chunk_rows = minimum(chunk_rows, round_up(N, group));
    tile_rows = is_tall(use) ? chunk_rows : minimum(tile_rows, chunk_rows);
  }
};

// Where inner products stand that are kept: bands of kChunkRows rows, of each the columns from its diagonal on for
// self-similarity, in blocks of kBlock columns. Narrow blocks stand side by side, as parts of one of kBlock columns.
class Bands {
 public:
  Bands(const SimilarityProblem& p, int64_t group) : p_(p), group_(group) {
    if (!p.kept) return;
    int64_t used = 0;
    for (int64_t begin = 0; begin < p.N; begin += kChunkRows, ++count_) {
      const int64_t size = round_up(p.M - first_column(begin), kBlock) * padded_rows(begin);
      if (used + size > p.kept_size) break;
      used += size;
    }
  }
  // Whether the rows in front of `end` are kept.
  bool keep(int64_t end) const { return p_.kept && (end + kChunkRows - 1) / kChunkRows <= count_; }
  // Of a tile in elements; its rows lie in one band.
  int64_t offset(const Block& block) const {
    const int64_t begin = block.i / kChunkRows * kChunkRows, column = block.j - first_column(begin);
    int64_t before = 0;
    for (int64_t b = 0; b < begin; b += kChunkRows) before += round_up(p_.M - first_column(b), kBlock) * kChunkRows;
    return before + column / kBlock * kBlock * padded_rows(begin) + column % kBlock + (block.i - begin) * kBlock;
  }

 private:
  int64_t first_column(int64_t begin) const { return p_.self ? begin : 0; }
  int64_t padded_rows(int64_t begin) const { return round_up(minimum(kChunkRows, p_.N - begin), group_); }

  const SimilarityProblem& p_;
  const int64_t group_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace LEVEL
}  // namespace contrastive_ops
