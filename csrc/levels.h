// The SIMD levels that files of cpu/ are compiled for, each in a namespace of its own.
#pragma once

namespace contrastive_ops {

// Declares the functions of a primitive: those of each level, and by <stem>_cpu() those of the level in use
// (cpu/capability.cpp).
#define CONTRASTIVE_OPS_PRIMITIVE(Functions, stem) \
  namespace level_default {                        \
  Functions stem();                                \
  }                                                \
  namespace level_avx2 {                           \
  Functions stem();                                \
  }                                                \
  namespace level_avx512 {                         \
  Functions stem();                                \
  }                                                \
  namespace level_avx512_bf16 {                    \
  Functions stem();                                \
  }                                                \
  namespace level_amx {                            \
  Functions stem();                                \
  }                                                \
  Functions stem##_cpu();

}  // namespace contrastive_ops
