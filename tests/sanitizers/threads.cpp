// In place of torch's OpenMP, of whose barriers ThreadSanitizer knows nothing: a team of std::thread for each region.
// csrc/threads.cpp looks its runtime up by name, and is compiled with this function in the place of dlsym.
#include <dlfcn.h>

#include <cstring>
#include <thread>
#include <vector>

// dlfcn.h has declared it under the name that the command line gives it.
#ifdef dlsym
#undef dlsym
#endif

namespace {

thread_local bool in_team = false;

void start(void (*body)(void*), void* data, unsigned count, unsigned) {
  const auto member = [=] {
    in_team = true;
    body(data);
  };
  std::vector<std::thread> team;
  for (unsigned k = 1; k < count; ++k) team.emplace_back(member);
  member();
  in_team = false;
  for (std::thread& thread : team) thread.join();
}

int in_parallel() { return in_team; }

}  // namespace

extern "C" {

void* dlsym(void* handle, const char* name) noexcept;

void* dlsym_of_sanitizers(void* handle, const char* name) noexcept {
  if (std::strcmp(name, "GOMP_parallel") == 0) return reinterpret_cast<void*>(start);
  if (std::strcmp(name, "omp_in_parallel") == 0) return reinterpret_cast<void*>(in_parallel);
  return dlsym(handle, name);
}
}
