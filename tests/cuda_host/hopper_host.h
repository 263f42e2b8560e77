// The instructions of csrc/cuda/hopper/primitives.h on the host.
//
// What is done aside of the threads is done when nobody could complain on a device: a copy arrives, and a store reads
// its memory, at any time until somebody has waited for it; a tile that is being written holds NaN meanwhile; products
// are made at the last moment that a wait allows, or at the first. Besides:
//
//   - barriers must have been made, get no more arrivals and bytes than they were made for, and are told apart by the
//     parity of their phase alone;
//   - what threads write must be fenced before a store reads it, by the thread that wrote it;
//   - a group of warps multiplies, waits and changes its registers as one, and registers that somebody wants must have
//     been left by others;
//   - a block must not end before its copies and its stores.
#pragma once

#include "cuda_host.h"

namespace contrastive_ops::hopper {

constexpr size_t kTileAlignment = 1;  // its memory is aligned

// A matrix of 16-bit numbers and the rows of a tile.
struct TensorMap {
  unsigned char* data = nullptr;
  int64_t rows = 0, cols = 0, pitch = 0;  // in numbers
  int tile_rows = 0;
};

void barrier_init(uint64_t* barrier, int arrivals);
void fence_barrier_init();
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_arrive_at(uint64_t* barrier, int block);
void barrier_wait(uint64_t* barrier, int parity);

void cluster_sync();
int cluster_rank();
void named_sync(int id, int threads);
void named_arrive(int id, int threads);
void change_registers(int count, bool takes);
template <int count>
void give_registers() {
  change_registers(count, false);
}
template <int count>
void take_registers() {
  change_registers(count, true);
}

inline void prefetch_map(const TensorMap*) {}
void load_tile_to(const TensorMap* map, void* to, uint64_t* barrier, int col, int row, uint16_t blocks);
inline void load_tile(const TensorMap* map, void* to, uint64_t* barrier, int col, int row) {
  load_tile_to(map, to, barrier, col, row, static_cast<uint16_t>(1u << cluster_rank()));
}
void fence_async();
void store_tile(const TensorMap* map, const void* from, int col, int row);
void store_commit();
void store_wait_read();
void store_wait();
void store_matrices(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d);

uint64_t tile_descriptor(const void* at);
void mma_fence();
void mma_commit();
void wait_for_products(int count);
template <int count>
void mma_wait() {
  wait_for_products(count);
}
using Widen = float (*)(const unsigned char* number);
void add_product(float* sums, int n, uint64_t of_rows, uint64_t of_cols, bool adds, Widen widen);
template <class T, int n>
void mma(float (&sums)[n / 2], uint64_t of_rows, uint64_t of_cols, bool adds) {
  add_product(sums, n, of_rows, of_cols, adds, [](const unsigned char* number) {
    T value;
    memcpy(&value, number, sizeof(T));
    return cuda_host::widen(value);
  });
}

inline int hidden(int x) { return x; }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_inverse(float x) { return 1.0f / x; }
inline float fast_log2(float x) { return std::log2(x); }
template <class T>
uint32_t rounded_pair(float a, float b) {
  const T pair[2] = {cuda_host::narrow<T>(a), cuda_host::narrow<T>(b)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

template <class T>
T& shared_tiles() {
  return *static_cast<T*>(cuda_host::shared_memory());
}

}  // namespace contrastive_ops::hopper
