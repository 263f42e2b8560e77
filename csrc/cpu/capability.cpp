#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../similarity_reduce.h"

namespace contrastive_ops {

namespace {
constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};
}

const char* capability_name(Capability level) { return kNames[static_cast<int>(level)]; }

Capability detected_capability() {
#ifdef CONTRASTIVE_OPS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::standard;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Capability::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
#else
  return Capability::standard;
#endif
}

Capability capability() {
  const Capability detected = detected_capability();
  const char* text = std::getenv("CONTRASTIVE_OPS_CPU_CAPABILITY");
  if (text == nullptr || *text == '\0') return detected;
  for (int level = 0; level < 4; ++level) {
    if (std::string(text) == kNames[level]) {
      // A cap, not a request: a level that the processor lacks would be an illegal instruction.
      return static_cast<int>(detected) < level ? detected : static_cast<Capability>(level);
    }
  }
  throw std::invalid_argument(
      "CONTRASTIVE_OPS_CPU_CAPABILITY: value must be default, avx2, avx512 or avx512_bf16, got " + std::string(text) +
      "\n  unset the variable to use what the processor has");
}

SimilarityReduce similarity_reduce_cpu() {
  switch (capability()) {
#ifdef CONTRASTIVE_OPS_X86
    case Capability::avx512_bf16:
      return level_avx512_bf16::similarity_reduce();
    case Capability::avx512:
      return level_avx512::similarity_reduce();
    case Capability::avx2:
      return level_avx2::similarity_reduce();
#endif
    default:
      return level_default::similarity_reduce();
  }
}

}  // namespace contrastive_ops
