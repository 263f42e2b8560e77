// Regions of csrc/threads.cpp on threads and on virtual cores, without Python. Prints "done", or what is wrong.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/threads.h"

namespace at {
int threads = 4;
__attribute__((visibility("default"))) int get_num_threads() { return threads; }
}  // namespace at

#ifdef STANDARD_THREADS
// In place of OpenMP's, whose barriers a sanitizer does not see.
extern "C" {
__attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> team;
  for (unsigned k = 1; k < count; ++k) team.emplace_back(body, data);
  body(data);
  for (auto& thread : team) thread.join();
}
__attribute__((visibility("default"))) int omp_in_parallel() { return 0; }
}
#endif

using namespace contrastive_ops;

namespace {

int wrong = 0;
void expect(bool right, const char* what) {
  if (right) return;
  ++wrong;
  std::printf("wrong: %s\n", what);
}

constexpr int kTasks = 200;

// How many tasks of each stage have ended; a task of a later stage must see all of those that it waits for.
struct Seen {
  std::atomic<int> ended[3] = {}, early{0}, runs[kTasks] = {};
  int fails_at = -1;
};
void note(void* context, int64_t index, int) {
  Seen& seen = *static_cast<Seen*>(context);
  const int stage = index < 90 ? 0 : index < 150 ? 1 : 2;
  if (stage == 1 && seen.ended[0] != 90) ++seen.early;
  if (stage == 2 && seen.ended[0] != 90) ++seen.early;
  ++seen.runs[index];
  if (index == seen.fails_at) throw std::runtime_error("task");
  for (volatile int k = 0; k < 2000; k = k + 1) {
  }
  ++seen.ended[stage];
}
// The third stage waits for an empty one, which waits for the first.
const int first[] = {0}, join[] = {2};
const Stage stages[] = {{90}, {60, first, 1}, {0, first, 1}, {50, join, 1}};

void run_all(const Parallel& parallel, const char* where) {
  for (int round = 0; round < 20; ++round) {
    Seen seen;
    parallel.run_stages(4, stages, note, &seen);
    expect(seen.early == 0, where);
    for (const auto& runs : seen.runs) expect(runs == 1, where);
  }
  Seen failing;
  failing.fails_at = 40;
  bool thrown = false;
  try {
    parallel.run_stages(4, stages, note, &failing);
  } catch (const std::runtime_error& error) {
    thrown = std::strcmp(error.what(), "task") == 0;
  }
  expect(thrown && failing.ended[1] == 0 && failing.ended[2] == 0, "an error ends the region");
}

void spend(void*, int64_t, int) {
  for (volatile int k = 0; k < 20000; k = k + 1) {
  }
}
ModelledRegion modelled(int cores, int count, const Stage* all) {
  model_cores(cores);
  parallel().run_stages(count, all, spend, nullptr);
  return model_cores(0).at(0);
}
bool close(double a, double b) { return a > b * (1 - 1e-9) && a < b * (1 + 1e-9); }

void check_model() {
  const Stage one[] = {{8}};
  const int zero[] = {0}, second[] = {1};
  const Stage chain[] = {{1}, {1, zero, 1}, {1, second, 1}};
  const ModelledRegion alone = modelled(8, 1, one), serial = modelled(1, 1, one), waiting = modelled(8, 3, chain);
  expect(alone.tasks == 8 && close(alone.makespan, alone.longest), "a core for each task");
  expect(close(serial.makespan, serial.total), "one core");
  expect(waiting.tasks == 3 && close(waiting.makespan, waiting.total), "a chain does not get faster");
  const ModelledRegion halves = modelled(2, 1, one);
  expect(halves.makespan >= halves.total / 2 * (1 - 1e-9) && halves.makespan < halves.total, "two cores");
  expect(model_cores(0).empty(), "the account is cleared");
  parallel().run_stages(1, one, spend, nullptr);
  expect(model_cores(0).empty(), "nothing is counted when it is off");
}

}  // namespace

int main() {
  find_threads(nullptr);
  expect(has_threads() && parallel().threads == 4, "threads are found");
  run_all(parallel(), "on threads");
  at::threads = 64;
  run_all(parallel(), "on more threads than cores");
  run_all(one_thread(), "on one thread");
  model_cores(5);
  expect(parallel().threads == 5, "as many threads as virtual cores");
  run_all(parallel(), "on virtual cores");
  model_cores(0);
  check_model();
  if (wrong == 0) std::printf("done\n");
  return wrong != 0;
}
