// The SIMD levels that files of cpu/ are compiled for, each in a namespace of its own.
#pragma once

// The level that has what this one leaves to another; itself where there is none.
#ifndef LEVEL_BELOW
#define LEVEL_BELOW LEVEL
#endif

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
  namespace level_neon {                           \
  Functions stem();                                \
  }                                                \
  namespace level_neon_bf16 {                      \
  Functions stem();                                \
  }                                                \
  Functions stem##_cpu();

}  // namespace contrastive_ops
