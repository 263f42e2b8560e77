// See cuda_host.h.
#include "cuda_host.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Of swapcontext, most of the time of a test went into signal masks, two calls of the system each time, and under
// AddressSanitizer into shadow memory of a whole stack. What a function must keep goes on the stack that is left.
extern "C" void cuda_host_switch(void** left, void* entered);
asm(R"(
  .text
  .hidden cuda_host_switch
  .globl cuda_host_switch
  .type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_host_switch, . - cuda_host_switch
)");
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {
namespace {

constexpr size_t kStack = size_t{256} << 10;
constexpr std::align_val_t kAlignment{1024};
constexpr int kWarp = 32;

enum class State { ready, at_barrier, at_exchange, waits, returned };

#if defined(__x86_64__)
// Where a fiber, or who resumes fibers, goes on: the top of its stack.
struct Context {
  void* top = nullptr;

  void begin(void* stack, size_t size, void (*function)()) {
    auto** place = reinterpret_cast<void**>(static_cast<unsigned char*>(stack) + size) - 1;
    *place = nullptr;                              // the address that the function, which never returns, returns to
    *--place = reinterpret_cast<void*>(function);  // that of the switch
    top = place - 6;                               // registers, whatever they are
  }
  void leave_for(const Context& other) { cuda_host_switch(&top, other.top); }
};
#else
struct Context {
  ucontext_t context{};

  void begin(void* stack, size_t size, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
  void leave_for(const Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // of AddressSanitizer
  State state = State::returned;
  unsigned mask = 0;
  const char* place = "";
  uint64_t brought = 0;
  uint64_t received[kWarp] = {};
  std::function<bool()> until;
};

Schedule the_schedule = Schedule::ascending;
std::mt19937 the_random;
std::vector<std::unique_ptr<Fiber>> fibers;
int thread_count = 0, block_threads = 0, running = -1;  // threads of a cluster, and of a block
unsigned first_block = 0;
int64_t clusters_begun = 0;
Context scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* the_kernel = nullptr;
struct Freed {
  void operator()(unsigned char* memory) const { operator delete[](memory, kAlignment); }
};
std::vector<std::unique_ptr<unsigned char, Freed>> shared;  // of each block of the cluster
size_t the_shared_bytes = 0;
std::vector<std::function<void()>> events;
int64_t the_launches = 0;
void (*the_listener)() = nullptr;

// AddressSanitizer wants to know which stack is in use.
void before_switch(void** save, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#else
  (void)save, (void)stack, (void)size;
#endif
}
void after_switch(void* saved, const void** old_stack, size_t* old_size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, old_stack, old_size);
#else
  (void)saved, (void)old_stack, (void)old_size;
#endif
}

// Makes a thread the one that runs, as far as it can tell.
void choose(int thread) {
  running = thread;
  threadIdx = {static_cast<unsigned>(thread % block_threads), 0, 0};
  blockIdx = {first_block + static_cast<unsigned>(thread / block_threads), 0, 0};
}

void resume(int thread) {
  Fiber& fiber = *fibers[thread];
  choose(thread);
  before_switch(&scheduler_fake_stack, fiber.stack, kStack);
  scheduler.leave_for(fiber.context);
  after_switch(scheduler_fake_stack, nullptr, nullptr);
  running = -1;
}

// From the fiber that runs to the scheduler; `last`: it will not run again.
void yield(bool last) {
  Fiber& fiber = *fibers[running];
  before_switch(last ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_size);
  fiber.context.leave_for(scheduler);
  after_switch(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
}

void run_thread() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*the_kernel)();
  fibers[running]->state = State::returned;
  yield(true);
}

void start(int thread) {
  if (static_cast<int>(fibers.size()) <= thread) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  Fiber& fiber = *fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);  // of the thread that had it before, and left it in its midst
#endif
  fiber.context.begin(fiber.stack, kStack, run_thread);
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
}

std::vector<int64_t> order_of(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (the_schedule == Schedule::descending) std::reverse(order.begin(), order.end());
  if (the_schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), the_random);
  return order;
}

bool waits(int thread, State state) { return fibers[thread]->state == state; }

// Lets a group of lanes go on if all of them are there.
bool release_exchange(int first) {
  const Fiber& leader = *fibers[first];
  const int warp = first / kWarp * kWarp;
  uint64_t brought[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((leader.mask >> lane & 1) == 0) continue;
    const int thread = warp + lane;
    if (thread >= thread_count || waits(thread, State::returned)) {
      choose(first);
      fail("a warp's exchange names a lane that has returned or is none");
    }
    if (!waits(thread, State::at_exchange)) return false;
    const Fiber& other = *fibers[thread];
    if (other.mask != leader.mask || strcmp(other.place, leader.place) != 0) return false;
    brought[lane] = other.brought;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((leader.mask >> lane & 1) == 0) continue;
    Fiber& other = *fibers[warp + lane];
    memcpy(other.received, brought, sizeof(brought));
    other.state = State::ready;
  }
  return true;
}

// Lets a block go on if all of its threads are there.
bool release_barrier(int first) {
  bool any = false;
  for (int thread = first; thread < first + block_threads; ++thread) {
    if (!waits(thread, State::at_barrier) && !waits(thread, State::returned)) return false;
    any |= waits(thread, State::at_barrier);
  }
  for (int thread = first; thread < first + block_threads; ++thread) {
    if (waits(thread, State::at_barrier)) fibers[thread]->state = State::ready;
  }
  return any;
}

bool release_waiting() {
  bool any = false;
  for (int thread = 0; thread < thread_count; ++thread) {
    if (!waits(thread, State::waits) || !fibers[thread]->until()) continue;
    fibers[thread]->state = State::ready;
    any = true;
  }
  return any;
}

void happen(size_t which) {
  const std::function<void()> event = std::move(events[which]);
  events.erase(events.begin() + static_cast<int64_t>(which));
  event();
}

// Events after the threads have gone on, or could not.
bool let_events_happen(bool moved) {
  bool any = false;
  while (!events.empty()) {
    if (the_schedule == Schedule::ascending && (moved || any)) break;
    if (the_schedule == Schedule::shuffled && (moved || any) && the_random() % 4 != 0) break;
    happen(the_schedule == Schedule::shuffled ? the_random() % events.size() : 0);
    any = true;
  }
  return any;
}

void run_cluster() {
  for (int thread = 0; thread < thread_count; ++thread) start(thread);
  for (;;) {
    bool moved = false;
    for (const int64_t thread : order_of(thread_count)) {
      if (!waits(static_cast<int>(thread), State::ready)) continue;
      resume(static_cast<int>(thread));
      moved = true;
    }
    for (int thread = 0; thread < thread_count; ++thread) {
      if (waits(thread, State::at_exchange)) moved |= release_exchange(thread);
    }
    for (int first = 0; first < thread_count; first += block_threads) moved |= release_barrier(first);
    moved |= release_waiting();
    moved |= let_events_happen(moved);
    if (moved) continue;
    for (int thread = 0; thread < thread_count; ++thread) {
      if (waits(thread, State::returned)) continue;
      choose(thread);
      fail("threads wait for each other: a barrier or an exchange is not reached by all");
    }
    return;
  }
}

}  // namespace

void set_schedule(Schedule schedule, unsigned seed) {
  the_schedule = schedule;
  the_random.seed(seed);
}

void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel, int cluster) {
  if (threads < 1 || threads > 1024) fail("a block must have 1 to 1024 threads");
  if (cluster < 1 || blocks % cluster != 0) fail("a grid must have a whole number of clusters");
  if (the_listener != nullptr) the_listener();
  ++the_launches;
  the_kernel = &kernel;
  block_threads = threads, thread_count = cluster * threads;
  the_shared_bytes = shared_bytes;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (const int64_t each : order_of(blocks / cluster)) {
    first_block = static_cast<unsigned>(each * cluster);
    ++clusters_begun;
    shared.clear();
    for (int block = 0; block < cluster; ++block) {
      // Of its own, so that a sanitizer sees what reaches beyond it.
      shared.emplace_back(static_cast<unsigned char*>(operator new[](shared_bytes, kAlignment)));
      memset(shared.back().get(), 0xff, shared_bytes);
    }
    run_cluster();
  }
  shared.clear();
}

int64_t launches() { return the_launches; }

void set_listener(void (*listener)()) { the_listener = listener; }

void* shared_memory() { return shared[running / block_threads].get(); }

void later(std::function<void()> event) { events.push_back(std::move(event)); }

int64_t cluster_number() { return clusters_begun; }
int cluster_blocks() { return thread_count / block_threads; }
int thread_of_cluster() { return running; }
unsigned char* shared_memory_of(int block) { return shared[block].get(); }
size_t shared_bytes() { return the_shared_bytes; }
bool has_ended(int block) {
  for (int thread = block * block_threads; thread < (block + 1) * block_threads; ++thread) {
    if (!waits(thread, State::returned)) return false;
  }
  return true;
}

void wait_until(const char* place, const std::function<bool()>& ready) {
  Fiber& fiber = *fibers[running];
  if (ready()) return;
  fiber.state = State::waits, fiber.place = place, fiber.until = ready;
  yield(false);
}

void sync_block() {
  fibers[running]->state = State::at_barrier;
  yield(false);
}

const uint64_t* exchange(unsigned mask, uint64_t brought, const char* place) {
  Fiber& fiber = *fibers[running];
  if ((mask >> lane() & 1) == 0) fail("a warp's exchange must name the lane that calls it");
  fiber.state = State::at_exchange;
  fiber.mask = mask;
  fiber.place = place;
  fiber.brought = brought;
  yield(false);
  return fiber.received;
}

void fail(const char* message) {
  const State state = running >= 0 ? fibers[running]->state : State::ready;
  const bool at_place = state == State::at_exchange || state == State::waits;
  fprintf(stderr, "cuda_host: %s (thread %u of block %u%s%s)\n", message, threadIdx.x, blockIdx.x,
          at_place ? ", at " : "", at_place ? fibers[running]->place : "");
  fflush(stderr);
  abort();
}

}  // namespace cuda_host
