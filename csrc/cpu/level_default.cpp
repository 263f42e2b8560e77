// The default level: every primitive, compiled with this level's flags (setup.py).
#define LEVEL level_default
#define VECTOR_BYTES 16
#include "expert_routing.cpp"
#include "grouped_matmul.cpp"
#include "maxsim.cpp"
#include "similarity_distill.cpp"
#include "similarity_prefix.cpp"
#include "similarity_reduce.cpp"
#include "similarity_topk.cpp"
#include "similarity_values.cpp"
