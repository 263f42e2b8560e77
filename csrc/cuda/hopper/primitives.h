// The few instructions of Hopper that kernels here need, each a function; beyond this file they are plain C++.
//
// On a GPU they are PTX of sm_90a. The host's compiler gets a twin of each from tests/cuda_host/hopper_host.h, which
// runs the same kernels with copies that arrive late, products that are made late, and memory that is read late.
#pragma once

#include "../launch.h"

// Kernels of this folder have a body where the compiler makes code for 9.0a, and none for other GPUs, which do not
// start them.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CONTRASTIVE_OPS_HAS_HOPPER
#endif

#ifndef __CUDACC__
#include "hopper_host.h"
#else
#include <cuda.h>

namespace contrastive_ops::hopper {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// ---- Barriers in shared memory --------------------------------------------------------------------------------------
//
// A barrier has phases. One ends when as many threads have arrived as it was made for and all bytes that were announced
// have been written; waiting for phase 0, 1, 0, 1, ... returns once the phase of that parity has ended.

__device__ inline void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barriers known to the copies, and to the other blocks after cluster_sync.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and announces bytes that copies will write.
__device__ inline void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Arrives at the barrier in the same place of a block of the cluster.
__device__ inline void barrier_arrive_at(uint64_t* barrier, int block) {
  asm volatile(
      "{\n .reg .b32 at;\n mapa.shared::cluster.u32 at, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [at];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}

// ---- Clusters and groups of warps -----------------------------------------------------------------------------------

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Barrier `id` of 16, at which `threads` threads wait or only say that they have been there.
__device__ inline void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// A group of 128 threads leaves registers to others, or takes them once they are there.
template <int count>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- Copies of tiles ------------------------------------------------------------------------------------------------
//
// A tile has rows of 64 numbers of 16 bits, whose 16-byte chunks are swizzled: chunk c of row r is at c ^ r % 8. What
// is outside the matrix is read as 0 and not written.

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ inline void load_tile(const CUtensorMap* map, void* to, uint64_t* barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}
// To the same place of every block of the cluster whose bit is set; their barriers count the bytes.
__device__ inline void load_tile_to(const CUtensorMap* map, void* to, uint64_t* barrier, int col, int row,
                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}
// What threads wrote becomes visible to the copies that follow a barrier.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void store_tile(const CUtensorMap* map, const void* from, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(col), "r"(row)
               : "memory");
}
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all stores that this thread has committed have been read, and until they have been written.
__device__ inline void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Lane l gives the address of row l % 8 of the 8 x 8 matrix l / 8; of each, a lane holds two neighbours of row l / 4.
__device__ inline void store_matrices(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(at)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- Products -------------------------------------------------------------------------------------------------------
//
// A warpgroup adds 64 x 16 times (n x 16)^T, both in shared memory as tiles above, to float32 registers: of row
// 16 warp + lane / 4 + 8 h and column 8 k + lane % 4 * 2 + q a thread has number 4 k + 2 h + q.

// Where a tile begins, or 16 columns of it: rows of 128 swizzled bytes, 1024 bytes from 8 rows to the next.
__device__ inline uint64_t tile_descriptor(const void* at) {
  const uint64_t address = shared_address(at);
  return ((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}
__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the last `count` have been added.
template <int count>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(count) : "memory");
}

#define CONTRASTIVE_OPS_IO8(d, i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CONTRASTIVE_OPS_IO32(d, i)                                                          \
  CONTRASTIVE_OPS_IO8(d, i), CONTRASTIVE_OPS_IO8(d, i + 8), CONTRASTIVE_OPS_IO8(d, i + 16), \
      CONTRASTIVE_OPS_IO8(d, i + 24)
#define CONTRASTIVE_OPS_R64                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"             \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CONTRASTIVE_OPS_R96                                                          \
  CONTRASTIVE_OPS_R64                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CONTRASTIVE_OPS_MMA(n, type, registers, a, b, add, ...)                                                        \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " add ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
               "." type " {" registers "}, " a ", " b ", p, 1, 1, 0, 0;\n}"                                            \
               : __VA_ARGS__                                                                                           \
               : "l"(of_rows), "l"(of_cols), "r"(static_cast<int>(adds)))
#define CONTRASTIVE_OPS_MMA128(type)                                                                      \
  CONTRASTIVE_OPS_MMA(128, type, CONTRASTIVE_OPS_R64, "%64", "%65", "%66", CONTRASTIVE_OPS_IO32(sums, 0), \
                      CONTRASTIVE_OPS_IO32(sums, 32))
#define CONTRASTIVE_OPS_MMA192(type)                                                                      \
  CONTRASTIVE_OPS_MMA(192, type, CONTRASTIVE_OPS_R96, "%96", "%97", "%98", CONTRASTIVE_OPS_IO32(sums, 0), \
                      CONTRASTIVE_OPS_IO32(sums, 32), CONTRASTIVE_OPS_IO32(sums, 64))

// sums += rows cols^T, or without the sum that was there.
template <class T, int n>
__device__ inline void mma(float (&sums)[n / 2], uint64_t of_rows, uint64_t of_cols, bool adds) {
  static_assert(n == 128 || n == 192, "other tiles have no instruction here");
  constexpr bool is_bfloat16 = std::is_same_v<T, BFloat16>;
  if constexpr (n == 128 && is_bfloat16) CONTRASTIVE_OPS_MMA128("bf16");
  if constexpr (n == 128 && !is_bfloat16) CONTRASTIVE_OPS_MMA128("f16");
  if constexpr (n == 192 && is_bfloat16) CONTRASTIVE_OPS_MMA192("bf16");
  if constexpr (n == 192 && !is_bfloat16) CONTRASTIVE_OPS_MMA192("f16");
}

// ---- Numbers --------------------------------------------------------------------------------------------------------

// The same number, but what is made of it is not made before the loop that this is in, where all registers have sums.
__device__ inline int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// 2^x, 1 / x and log2(x) in one instruction each.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded to 16 bits each, the first in the lower half.
template <class T>
__device__ inline uint32_t rounded_pair(float a, float b) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
  }
  return bits;
}

// ---- Memory, and how a kernel is started ----------------------------------------------------------------------------

// The memory of a block, of which tiles must begin at a multiple of 1024 bytes.
constexpr size_t kTileAlignment = 1024;
template <class T>
__device__ inline T& shared_tiles() {
  unsigned char* raw = shared_memory<unsigned char>();
  return *reinterpret_cast<T*>(raw + (kTileAlignment - shared_address(raw) % kTileAlignment) % kTileAlignment);
}

using TensorMap = CUtensorMap;

}  // namespace contrastive_ops::hopper
#endif
