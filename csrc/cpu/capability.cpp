#include "capability.h"

#ifdef CONTRASTIVE_OPS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../primitives.h"

namespace contrastive_ops {

namespace {
constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef CONTRASTIVE_OPS_AMX
// Whether the processor has the tiles and the kernel lets this process use them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kTileBFloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kTileBFloat16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
}  // namespace

const char* capability_name(Capability level) { return kNames[static_cast<int>(level)]; }

Capability detected_capability() {
#ifdef CONTRASTIVE_OPS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::standard;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Capability::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Capability::avx512;
#ifdef CONTRASTIVE_OPS_AMX
  static const bool amx = has_amx();
  if (amx) return Capability::amx;
#endif
  return Capability::avx512_bf16;
#else
  return Capability::standard;
#endif
}

Capability capability() {
  const Capability detected = detected_capability();
  const char* text = std::getenv("CONTRASTIVE_OPS_CPU_CAPABILITY");
  if (text == nullptr || *text == '\0') return detected;
  for (int level = 0; level < 5; ++level) {
    if (std::string(text) == kNames[level]) {
      // A cap, not a request: a level that the processor lacks would be an illegal instruction.
      return static_cast<int>(detected) < level ? detected : static_cast<Capability>(level);
    }
  }
  throw std::invalid_argument(
      "CONTRASTIVE_OPS_CPU_CAPABILITY: value must be default, avx2, avx512, avx512_bf16 or amx, got " +
      std::string(text) + "\n  unset the variable to use what the processor has");
}

// The functions of a primitive for the level in use.
#ifdef CONTRASTIVE_OPS_AMX
#define CONTRASTIVE_OPS_AMX_LEVEL(stem) \
  case Capability::amx:                 \
    return level_amx::stem();
#else
#define CONTRASTIVE_OPS_AMX_LEVEL(stem)
#endif
#ifdef CONTRASTIVE_OPS_X86
#define CONTRASTIVE_OPS_X86_LEVELS(stem) \
  CONTRASTIVE_OPS_AMX_LEVEL(stem)        \
  case Capability::avx512_bf16:          \
    return level_avx512_bf16::stem();    \
  case Capability::avx512:               \
    return level_avx512::stem();         \
  case Capability::avx2:                 \
    return level_avx2::stem();
#else
#define CONTRASTIVE_OPS_X86_LEVELS(stem)
#endif
#define CONTRASTIVE_OPS_OF_LEVEL(Functions, stem) \
  Functions stem##_cpu() {                        \
    switch (capability()) {                       \
      CONTRASTIVE_OPS_X86_LEVELS(stem)            \
      default:                                    \
        return level_default::stem();             \
    }                                             \
  }
CONTRASTIVE_OPS_PRIMITIVES(CONTRASTIVE_OPS_OF_LEVEL)

}  // namespace contrastive_ops
