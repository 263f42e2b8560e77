#include "capability.h"

#ifdef CONTRASTIVE_OPS_AMX  // the compiler knows it
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

// The build says by CONTRASTIVE_OPS_HAS_<LEVEL> which levels it has.
#if defined(__x86_64__)
constexpr Capability kLevels[] = {
#ifdef CONTRASTIVE_OPS_HAS_DEFAULT
    Capability::standard,
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX2
    Capability::avx2,
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX512
    Capability::avx512,
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX512_BF16
    Capability::avx512_bf16,
#endif
#ifdef CONTRASTIVE_OPS_HAS_AMX
    Capability::amx
#endif
};
#elif defined(__aarch64__)
constexpr Capability kLevels[] = {Capability::neon,
#ifdef CONTRASTIVE_OPS_HAS_NEON_BF16
                                  Capability::neon_bf16
#endif
};

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

std::string why_not_this_processor() {
  if (detected_capability() >= kLevels[0]) return "";
  return "contrastive_ops._C: the processor must have " + std::string(capability_name(kLevels[0])) +
         ", the lowest SIMD level that was built, got " + capability_name(detected_capability()) +
         "\n  install again on this machine: `make install` builds every level";
}

std::string capability_names() {
  std::string names;
  for (const Capability level : kLevels) names += std::string(names.empty() ? "" : " ") + capability_name(level);
  return names;
}

Capability capability() {
  Capability cap = detected_capability();
  const char* text = std::getenv("CONTRASTIVE_OPS_CPU_CAPABILITY");
  if (text != nullptr && *text != '\0') {
    const Capability* named = nullptr;
    for (const Capability& level : kLevels) {
      if (std::string(text) == capability_name(level)) named = &level;
    }
    if (named == nullptr) {
      throw std::invalid_argument("CONTRASTIVE_OPS_CPU_CAPABILITY: value must be a level of this build (" +
                                  capability_names() + "), got " + std::string(text) +
                                  "\n  unset the variable to use what the processor has");
    }
    // A cap, not a request: a level that the processor lacks would be an illegal instruction.
    if (*named < cap) cap = *named;
  }
  Capability best = kLevels[0];
  for (const Capability level : kLevels) {
    if (level <= cap) best = level;
  }
  return best;
}

// The functions of a primitive for the level in use.
#ifdef CONTRASTIVE_OPS_HAS_DEFAULT
#define CONTRASTIVE_OPS_CASE_DEFAULT(stem) \
  case Capability::standard:               \
    return level_default::stem();
#else
#define CONTRASTIVE_OPS_CASE_DEFAULT(stem)
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX2
#define CONTRASTIVE_OPS_CASE_AVX2(stem) \
  case Capability::avx2:                \
    return level_avx2::stem();
#else
#define CONTRASTIVE_OPS_CASE_AVX2(stem)
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX512
#define CONTRASTIVE_OPS_CASE_AVX512(stem) \
  case Capability::avx512:                \
    return level_avx512::stem();
#else
#define CONTRASTIVE_OPS_CASE_AVX512(stem)
#endif
#ifdef CONTRASTIVE_OPS_HAS_AVX512_BF16
#define CONTRASTIVE_OPS_CASE_AVX512_BF16(stem) \
  case Capability::avx512_bf16:                \
    return level_avx512_bf16::stem();
#else
#define CONTRASTIVE_OPS_CASE_AVX512_BF16(stem)
#endif
#ifdef CONTRASTIVE_OPS_HAS_AMX
#define CONTRASTIVE_OPS_CASE_AMX(stem) \
  case Capability::amx:                \
    return level_amx::stem();
#else
#define CONTRASTIVE_OPS_CASE_AMX(stem)
#endif
#ifdef CONTRASTIVE_OPS_HAS_NEON_BF16
#define CONTRASTIVE_OPS_CASE_NEON_BF16(stem) \
  case Capability::neon_bf16:                \
    return level_neon_bf16::stem();
#else
#define CONTRASTIVE_OPS_CASE_NEON_BF16(stem)
#endif
#if defined(__x86_64__)
#define CONTRASTIVE_OPS_LEVELS(stem)     \
  CONTRASTIVE_OPS_CASE_AMX(stem)         \
  CONTRASTIVE_OPS_CASE_AVX512_BF16(stem) \
  CONTRASTIVE_OPS_CASE_AVX512(stem)      \
  CONTRASTIVE_OPS_CASE_AVX2(stem)        \
  CONTRASTIVE_OPS_CASE_DEFAULT(stem)     \
  default:                               \
    break;
#elif defined(__aarch64__)
#define CONTRASTIVE_OPS_LEVELS(stem)   \
  CONTRASTIVE_OPS_CASE_NEON_BF16(stem) \
  default:                             \
    return level_neon::stem();
#else
#define CONTRASTIVE_OPS_LEVELS(stem) \
  default:                           \
    return level_default::stem();
#endif
#define CONTRASTIVE_OPS_OF_LEVEL(Functions, stem)          \
  Functions stem##_cpu() {                                 \
    switch (capability()) { CONTRASTIVE_OPS_LEVELS(stem) } \
    throw std::logic_error("a level that was not built");  \
  }
CONTRASTIVE_OPS_PRIMITIVES(CONTRASTIVE_OPS_OF_LEVEL)

}  // namespace contrastive_ops
