// CUDA's execution on the host: one fiber for each thread of a block, one block after another.
//
// A fiber runs until it waits: at __syncthreads, or at a warp's exchange until every lane that the mask names is there.
// Between waits threads run in an order that `Schedule` says, so that a result which depends on the order, as it does
// where a barrier is missing, differs between schedules. Shared memory is of the exact size that was asked for, and
// full of NaN at first. Sanitizers see every access.
//
// What cannot be: a grid of more than one dimension, static shared memory, textures, inline PTX, and anything that
// waits for another block that is not of its cluster. The instructions of Hopper have twins in hopper_host.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Those of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

enum class Schedule { ascending, descending, shuffled };

// The order of threads, and of blocks, of all launches from now on.
void set_schedule(Schedule schedule, unsigned seed);

// Calls `kernel` once for each thread of each block. The blocks of a cluster run side by side.
void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel, int cluster = 1);

// How many grids have been run.
int64_t launches();
// What is called before every launch from now on; null for nothing.
void set_listener(void (*listener)());

// The memory of the block that runs.
void* shared_memory();

// Waits for all threads of the block that have not returned.
void sync_block();

// Waits until `ready` says so; `place` is told where nothing makes it so any more.
void wait_until(const char* place, const std::function<bool()>& ready);

// What happens aside of the threads, as a copy does: as soon as may be in a descending order of threads, when no thread
// can go on otherwise in an ascending one, and at any time and in any order in a shuffled one.
void later(std::function<void()> event);

// Of the cluster that runs: how many have begun before it in all grids, its blocks, which of its threads runs, and the
// memory of a block.
int64_t cluster_number();
int cluster_blocks();
int thread_of_cluster();
unsigned char* shared_memory_of(int block);
size_t shared_bytes();
bool has_ended(int block);  // whether all threads of a block have returned

// Waits until all lanes in `mask` are at a call for the same `place`, and returns what each of the 32 lanes brought.
const uint64_t* exchange(unsigned mask, uint64_t brought, const char* place);

// Ends the program with a message that says which thread of which block ran.
[[noreturn]] void fail(const char* message);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  _Float16 value;
};
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float widen(Float16 x) { return static_cast<float>(x.value); }
template <class T>
T narrow(float x);
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  return {static_cast<_Float16>(x)};
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return threadIdx.x % 32; }

// What lane `source` of a segment of `width` lanes brought; the own value where `source` is outside.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, bool inside, const char* place) {
  const uint64_t* brought = exchange(mask, to_bits(value), place);
  const unsigned from = lane() / width * width + static_cast<unsigned>(source);
  if (!inside) return value;
  if ((mask >> from & 1) == 0) fail("a shuffle reads from a lane that its mask does not name");
  return from_bits<T>(brought[from]);
}

}  // namespace cuda_host

// ---- CUDA's names
// ------------------------------------------------------------------------------------------------------

inline void __threadfence() {}  // one fiber runs at a time
inline void __syncthreads() { cuda_host::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::exchange(mask, 0, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_host::shuffle(mask, value, source & (width - 1), width, true, "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int source = static_cast<int>(cuda_host::lane() % width) ^ flip;
  return cuda_host::shuffle(mask, value, source, width, source < width, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
  const int source = static_cast<int>(cuda_host::lane() % width) - static_cast<int>(step);
  return cuda_host::shuffle(mask, value, source, width, source >= 0, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
  const int source = static_cast<int>(cuda_host::lane() % width) + static_cast<int>(step);
  return cuda_host::shuffle(mask, value, source, width, source < width, "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* brought = cuda_host::exchange(mask, predicate != 0, "__ballot_sync");
  unsigned found = 0;
  for (unsigned each = 0; each < 32; ++each) {
    if ((mask >> each & 1) != 0 && brought[each] != 0) found |= 1u << each;
  }
  return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __activemask() {
  cuda_host::fail("__activemask says what happens to run, which is nothing to rely on");
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return cuda_host::from_bits<unsigned>(cuda_host::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_host::from_bits<float>(cuda_host::to_bits(x)); }
inline int __float_as_int(float x) { return cuda_host::from_bits<int>(cuda_host::to_bits(x)); }
inline float __int_as_float(int x) { return cuda_host::from_bits<float>(cuda_host::to_bits(x)); }
template <class T>
T __ldg(const T* at) {
  return *at;
}

// One fiber runs at a time. None for floats: their results would depend on the order.
template <class T>
T atomicAdd(T* at, T value) {
  static_assert(T(0.5) == T(0), "a float atomic gives another result in every run");
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
template <class T>
T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}

using std::exp;
using std::fmax;
using std::fmin;
using std::isnan;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
