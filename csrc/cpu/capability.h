// Which SIMD level this process uses: what the processor has, capped by CONTRASTIVE_OPS_CPU_CAPABILITY.
#pragma once

#include <string>

namespace contrastive_ops {

// Those of an architecture ascend; `standard` is what every processor has whose architecture is not named here.
enum class Capability : int { standard, avx2, avx512, avx512_bf16, amx, neon, neon_bf16 };

Capability detected_capability();
// Reads the environment on every call, so that a test can change it. Throws std::invalid_argument on a
// value that is no level.
Capability capability();
const char* capability_name(Capability level);
// Why nothing of this build can run here; empty where something can.
std::string why_not_this_processor();
// Names of the levels of this build, the lowest first, with spaces between.
std::string capability_names();

}  // namespace contrastive_ops
