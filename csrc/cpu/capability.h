// Which SIMD level this process uses: what the processor has, capped by CONTRASTIVE_OPS_CPU_CAPABILITY.
#pragma once

namespace contrastive_ops {

enum class Capability : int { standard = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Capability detected_capability();
// Reads the environment on every call, so that a test can change it. Throws std::invalid_argument on a
// value that is no level.
Capability capability();
const char* capability_name(Capability level);

}  // namespace contrastive_ops
