// The CUDA kernels of whole losses on the host, for contrastive_ops._eager: in its process, and so without sanitizers.
#include "../../csrc/kernels.h"
#include "cuda_host.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const void* loss_kernels() {
#define CONTRASTIVE_OPS_ADDRESS(name) &contrastive_ops::name,
  static const contrastive_ops::CudaKernels table{CONTRASTIVE_OPS_LOSS_FUNCTIONS(CONTRASTIVE_OPS_ADDRESS)};
#undef CONTRASTIVE_OPS_ADDRESS
  return &table;
}

EXPORT int64_t launches() { return cuda_host::launches(); }

EXPORT void set_listener(void (*listener)()) { cuda_host::set_listener(listener); }

EXPORT void set_schedule(int schedule, unsigned seed) {
  cuda_host::set_schedule(static_cast<cuda_host::Schedule>(schedule), seed);
}
