// Types of tensors, for files that must not include a torch header.
#pragma once

namespace contrastive_ops {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

}  // namespace contrastive_ops
