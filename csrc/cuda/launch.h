// What every kernel file is written against: the launch, shared memory, and numbers of 16 bits.
//
// The same files are compiled twice: by nvcc for GPUs, and by the host's compiler against tests/cuda_host/cuda_host.h,
// which runs every thread of every block in turn under sanitizers. Whatever differs between the two is in here, so
// that kernels themselves know of one world only:
//
//   - kernels are launched by `launch`, over a one-dimensional grid;
//   - shared memory is dynamic and comes from `shared_memory`; nothing is in it at first;
//   - float atomics are not used: results are the same in every run. Nor is inline PTX, but where hopper/primitives.h
//     has a twin of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_host.h"
#endif

#include "arguments.h"

// Before a loop whose count is known: arrays that its counter indexes stay in registers.
#ifdef __CUDACC__
#define CONTRASTIVE_OPS_UNROLL _Pragma("unroll")
#else
#define CONTRASTIVE_OPS_UNROLL
#endif

namespace contrastive_ops {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// The most blocks of a one-dimensional grid.
constexpr int64_t kMostBlocks = 0x7fffffff;

__host__ __device__ constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

using BFloat16 = __nv_bfloat16;
using Float16 = __half;
#define CONTRASTIVE_OPS_NOINLINE __noinline__

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// The bytes that `launch` was told, 16-byte aligned; undefined at first.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char contrastive_ops_shared[];
  return reinterpret_cast<T*>(contrastive_ops_shared);
}

// Enqueues `blocks` blocks of `threads` threads; no blocks are no launch. With CONTRASTIVE_OPS_CUDA_DEBUG every launch
// is waited for, so that an error is reported where it was made.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > kMostBlocks) throw std::runtime_error("CUDA: a launch must have fewer than 2^31 blocks");
  constexpr size_t kUnasked = 48 << 10;
  if (shared_bytes > kUnasked) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError());
#ifdef CONTRASTIVE_OPS_CUDA_DEBUG
  check_cuda(cudaStreamSynchronize(stream));
#endif
}

__host__ __device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(Float16 x) { return __half2float(x); }
template <class T>
__host__ __device__ T from_float(float x);
template <>
__host__ __device__ inline BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__host__ __device__ inline Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

#else

using BFloat16 = cuda_host::BFloat16;
using Float16 = cuda_host::Float16;
#define CONTRASTIVE_OPS_NOINLINE

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  cuda_host::run_grid(blocks, threads, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline float to_float(BFloat16 x) { return cuda_host::widen(x); }
inline float to_float(Float16 x) { return cuda_host::widen(x); }
template <class T>
T from_float(float x) {
  return cuda_host::narrow<T>(x);
}

#endif

__host__ __device__ inline float to_float(float x) { return x; }
template <>
__host__ __device__ inline float from_float<float>(float x) {
  return x;
}

// `count` numbers that are moved at once, at an address that is a multiple of their size.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};
// Numbers of 16 bytes.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
template <class T>
using Pack16 = Pack<T, kPack<T>>;

__host__ __device__ inline bool is_aligned16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// ---- Sums within a warp, in an order that does not depend on anything -----------------------------------------------

// Folds the values of a warp's lanes by a commutative function; every lane gets the result.
template <class T, class Function>
__device__ T fold_warp(T value, const Function& function) {
  for (int step = kWarp / 2; step > 0; step /= 2) value = function(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

// ---- The input type as a template argument --------------------------------------------------------------------------

// Calls function(T{}) with T the type that `dtype` names.
template <class Function>
void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(BFloat16{});
    case DType::float16:
      return function(Float16{});
    default:
      return function(float{});
  }
}

}  // namespace contrastive_ops
