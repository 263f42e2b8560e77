// How kernels of clusters are started, and what copies are told of a matrix; see primitives.h.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "primitives.h"

namespace contrastive_ops::hopper {

// A cluster of blocks shares what it reads of one operand.
constexpr int kCluster = 2;

// A matrix of 16-bit numbers, rows `pitch` numbers apart, as tiles of `tile_rows` x 64.
inline void check_matrix(const void* data, int64_t pitch) {
  if (!is_aligned16(data) || pitch % 8 != 0) {
    throw std::invalid_argument("matrix: it must be 16-byte aligned, and rows a multiple of 8 numbers apart");
  }
}

#ifdef __CUDACC__

inline TensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t pitch, int tile_rows) {
  check_matrix(data, pitch);
  // The driver's function without the driver's library, which a machine without a GPU does not have.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(status == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (encode == nullptr) throw std::runtime_error("CUDA: the driver has no tensor maps; update it to 525 or newer");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t tile[2] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
  TensorMap map;
  const CUresult status =
      encode(&map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(data), sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA: no tensor map of the matrix (error " + std::to_string(status) + ")");
  }
  return map;
}

// Enqueues as many clusters as run side by side, at most `most`, each of which goes on to the next tile.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t most, int threads, size_t shared_bytes, Stream stream,
                     const Arguments&... arguments) {
  if (most == 0) return;
  const size_t bytes = shared_bytes + kTileAlignment;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {kCluster, 1, 1}, config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters == 0) throw std::runtime_error("CUDA: the device has no room for a cluster of two blocks");
  config.gridDim.x = static_cast<unsigned>(kCluster * (most < clusters ? most : clusters));
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#ifdef CONTRASTIVE_OPS_CUDA_DEBUG
  check_cuda(cudaStreamSynchronize(stream));
#endif
}

#else

inline TensorMap tensor_map(const void* data, DType, int64_t rows, int64_t cols, int64_t pitch, int tile_rows) {
  check_matrix(data, pitch);
  return {static_cast<unsigned char*>(const_cast<void*>(data)), rows, cols, pitch, tile_rows};
}

// Two clusters, so that each of them has several tiles of a small matrix.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t most, int threads, size_t shared_bytes, Stream,
                     const Arguments&... arguments) {
  constexpr int64_t kAtOnce = 2;
  const int64_t clusters = most < kAtOnce ? most : kAtOnce;
  if (clusters == 0) return;
  const auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  cuda_host::run_grid(kCluster * clusters, threads, shared_bytes, call, kCluster);
}

#endif

}  // namespace contrastive_ops::hopper
