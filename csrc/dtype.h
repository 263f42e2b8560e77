// Types of tensors, for files that must not include a torch header.
#pragma once

namespace contrastive_ops {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// All types that a tensor may have; the first are those of DType.
enum class Type : int {
  float32 = 0,
  float64 = 1,
  bfloat16 = 2,
  float16 = 3,
  int64 = 4,
  int32 = 5,
  boolean = 6,
  int8 = 7,
  other = 8
};

}  // namespace contrastive_ops
