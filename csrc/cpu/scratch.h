// Memory that kernels use while they run, kept for the next call: what is given back to the system and asked for again
// at every step is zeroed by it page by page, for longer than small problems take to compute.
#pragma once

#include <cstddef>

namespace contrastive_ops {

// Uninitialised memory on a cache line, or null where there is none. Any thread may take it and any give it back.
void* take_scratch(size_t bytes);
void give_scratch(void* data);
// Returns what is kept to the allocator, and how many bytes that was.
size_t release_scratch();

}  // namespace contrastive_ops
