// What functions of the CUDA kernels take: bindings.cpp and tests/cuda_host/driver.cpp read their types.
//
// A function takes, in any order, a Stream, integers, doubles, pointers to float, int64_t, int32_t and bool (null where
// there is no tensor; const ones are inputs), Arrays, Integers and Doubles (lists that are on the host), and the types
// in here. All tensors are contiguous and on the stream's device; sizes are arguments of their own, and Python code,
// which knows them, is the only caller.
#pragma once

#include "../array.h"

struct CUstream_st;

namespace contrastive_ops {

using Stream = CUstream_st*;

// A tensor of float32, bfloat16 or float16; null where there is none.
struct Input {
  const void* data;
  DType dtype;
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};
struct Output {
  void* data;
  DType dtype;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace contrastive_ops
