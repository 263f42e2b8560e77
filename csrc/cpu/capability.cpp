#include "capability.h"

#ifdef CONTRASTIVE_OPS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../primitives.h"

namespace contrastive_ops {

namespace {
constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"};

#if defined(__x86_64__)
constexpr Capability kLevels[] = {Capability::standard, Capability::avx2, Capability::avx512, Capability::avx512_bf16,
#ifdef CONTRASTIVE_OPS_AMX
                                  Capability::amx
#endif
};
#elif defined(__aarch64__)
constexpr Capability kLevels[] = {Capability::neon, Capability::neon_bf16};

// Armv8.6 has the products of bfloat16 numbers, and so have some before it: Graviton3, Grace, Apple's from the M2 on.
bool has_bf16() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#elif defined(__linux__)
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#else
  return false;
#endif
}
#else
constexpr Capability kLevels[] = {Capability::standard};
#endif

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
#if defined(__x86_64__)
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
#elif defined(__aarch64__)
  static const bool bf16 = has_bf16();
  return bf16 ? Capability::neon_bf16 : Capability::neon;
#else
  return Capability::standard;
#endif
}

std::string capability_names() {
  std::string names;
  for (const Capability level : kLevels) names += std::string(names.empty() ? "" : " ") + capability_name(level);
  return names;
}

Capability capability() {
  const Capability detected = detected_capability();
  const char* text = std::getenv("CONTRASTIVE_OPS_CPU_CAPABILITY");
  if (text == nullptr || *text == '\0') return detected;
  for (const Capability level : kLevels) {
    // A cap, not a request: a level that the processor lacks would be an illegal instruction.
    if (std::string(text) == capability_name(level)) return detected < level ? detected : level;
  }
  throw std::invalid_argument("CONTRASTIVE_OPS_CPU_CAPABILITY: value must be a level of this build (" +
                              capability_names() + "), got " + std::string(text) +
                              "\n  unset the variable to use what the processor has");
}

// The functions of a primitive for the level in use.
#ifdef CONTRASTIVE_OPS_AMX
#define CONTRASTIVE_OPS_AMX_LEVEL(stem) \
  case Capability::amx:                 \
    return level_amx::stem();
#else
#define CONTRASTIVE_OPS_AMX_LEVEL(stem)
#endif
#if defined(__x86_64__)
#define CONTRASTIVE_OPS_LEVELS(stem)  \
  CONTRASTIVE_OPS_AMX_LEVEL(stem)     \
  case Capability::avx512_bf16:       \
    return level_avx512_bf16::stem(); \
  case Capability::avx512:            \
    return level_avx512::stem();      \
  case Capability::avx2:              \
    return level_avx2::stem();        \
  default:                            \
    return level_default::stem();
#elif defined(__aarch64__)
#define CONTRASTIVE_OPS_LEVELS(stem) \
  case Capability::neon_bf16:        \
    return level_neon_bf16::stem();  \
  default:                           \
    return level_neon::stem();
#else
#define CONTRASTIVE_OPS_LEVELS(stem) \
  default:                           \
    return level_default::stem();
#endif
#define CONTRASTIVE_OPS_OF_LEVEL(Functions, stem)          \
  Functions stem##_cpu() {                                 \
    switch (capability()) { CONTRASTIVE_OPS_LEVELS(stem) } \
  }
CONTRASTIVE_OPS_PRIMITIVES(CONTRASTIVE_OPS_OF_LEVEL)

}  // namespace contrastive_ops
