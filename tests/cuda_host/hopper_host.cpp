// See hopper_host.h.
#include "hopper_host.h"

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace contrastive_ops::hopper {
namespace {

using cuda_host::fail;

constexpr int kWarpgroup = 128, kDepth = 64, kRowBytes = 2 * kDepth, kNames = 16;
// Of a block, in units of one for each of its threads' warpgroups: 65536 / 128.
constexpr int kRegisters = 512;

struct Barrier {
  int arrivals = 0, missing = 0, phase = 0;
  int64_t bytes = 0;
  bool known = false;  // to copies and to other blocks

  void settle() {
    if (missing < 0) fail("a barrier gets more arrivals than it was made for");
    if (missing == 0 && bytes < 0) fail("a barrier gets more bytes than were announced");
    if (missing == 0 && bytes == 0) phase ^= 1, missing = arrivals;
  }
};

// Where threads meet.
struct Meeting {
  int threads = 0, arrived = 0, generation = 0;
};

struct Product {
  float* sums;
  int n;
  uint32_t rows, cols;
  bool adds;
  Widen widen;
};

struct Store {
  bool committed = false, read = false, written = false;
};

struct Thread {
  std::deque<std::vector<Product>> groups{1};  // the last one is not committed
  std::vector<std::shared_ptr<Store>> stores;
  bool fenced = false;
  int64_t made = 0;  // products
};

struct Group {
  Meeting meeting;
  int registers = 0;
  std::map<int64_t, std::vector<float>> products;  // the last ones
};

// Of the cluster that runs.
struct Cluster {
  int64_t number = -1;
  std::map<std::pair<int, uint32_t>, Barrier> barriers;
  std::map<std::pair<int, int>, Meeting> named;
  Meeting everybody;
  std::map<int, Thread> threads;
  std::map<int, Group> groups;
  std::vector<int> left;                        // registers, of each block
  std::vector<std::map<uint32_t, int>> writes;  // of each block: who wrote 4 bytes and did not fence them
};

Cluster& cluster() {
  static Cluster now;
  if (now.number != cuda_host::cluster_number()) {
    now = Cluster();
    now.number = cuda_host::cluster_number();
    now.writes.resize(cuda_host::cluster_blocks());
    // As the launch gave them: equal shares, in steps of 8.
    const int groups = static_cast<int>(blockDim.x) / kWarpgroup, share = groups == 0 ? 0 : kRegisters / groups / 8 * 8;
    now.left.assign(cuda_host::cluster_blocks(), kRegisters - groups * share);
    for (int g = 0; g < groups * cuda_host::cluster_blocks(); ++g) now.groups[g].registers = share;
  }
  return now;
}

int block() { return cuda_host::thread_of_cluster() / static_cast<int>(blockDim.x); }
Thread& self() { return cluster().threads[cuda_host::thread_of_cluster()]; }
Group& own_group() { return cluster().groups[cuda_host::thread_of_cluster() / kWarpgroup]; }

uint32_t offset_of(const void* at) {
  const auto offset = static_cast<const unsigned char*>(at) - cuda_host::shared_memory_of(block());
  if (offset < 0 || offset >= static_cast<int64_t>(cuda_host::shared_bytes()))
    fail("an address is not of shared memory");
  return static_cast<uint32_t>(offset);
}
uint32_t tile_offset(const void* at, int rows) {
  const uint32_t offset = offset_of(at);
  if (offset % 1024 != 0) fail("a tile must begin at a multiple of 1024 bytes");
  if (offset + static_cast<size_t>(rows) * kRowBytes > cuda_host::shared_bytes())
    fail("a tile reaches beyond its memory");
  return offset;
}
// Where byte `offset` of a tile is: bits 4 to 6 are exchanged by bits 7 to 9.
uint32_t swizzled(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

void meet(Meeting& meeting, int threads, bool waits, const char* place) {
  if (meeting.arrived > 0 && meeting.threads != threads) fail("threads meet at a barrier with other counts");
  meeting.threads = threads;
  const int generation = meeting.generation;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else if (waits) {
    cuda_host::wait_until(place, [&meeting, generation] { return meeting.generation != generation; });
  }
}

Barrier& barrier_at(int in_block, const uint64_t* at) {
  const auto found = cluster().barriers.find({in_block, offset_of(at)});
  if (found == cluster().barriers.end()) fail("a barrier is used that was not made");
  return found->second;
}

Barrier& known_barrier_at(int in_block, const uint64_t* at) {
  Barrier& found = barrier_at(in_block, at);
  if (!found.known) fail("a barrier is used that was not fenced after it was made");
  return found;
}

// Calls use(where it is in the matrix, or null outside of it; where it is in shared memory) for each number of a tile.
template <class Use>
void each_number(const TensorMap& map, int col, int row, uint32_t tile, const Use& use) {
  for (int r = 0; r < map.tile_rows; ++r) {
    for (int c = 0; c < kDepth; ++c) {
      const int64_t i = int64_t{row} + r, j = int64_t{col} + c;
      const bool inside = i >= 0 && i < map.rows && j >= 0 && j < map.cols;
      use(inside ? map.data + 2 * (i * map.pitch + j) : nullptr, swizzled(tile + r * kRowBytes + 2 * c));
    }
  }
}

// 64 x n products of a warpgroup, one column after another.
std::vector<float> product_of(const Product& p, const unsigned char* memory) {
  constexpr int kRows = 64, kTerms = 16;
  const auto numbers_of = [&](uint32_t tile, int rows) {
    std::vector<float> numbers(static_cast<size_t>(rows) * kTerms);
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < kTerms; ++k) {
        numbers[row * kTerms + k] = p.widen(memory + swizzled(tile + row / 8 * 1024 + row % 8 * kRowBytes + 2 * k));
      }
    }
    return numbers;
  };
  const std::vector<float> rows = numbers_of(p.rows, kRows), cols = numbers_of(p.cols, p.n);
  std::vector<float> found(static_cast<size_t>(p.n) * kRows);
  for (int col = 0; col < p.n; ++col) {
    for (int row = 0; row < kRows; ++row) {
      const float *a = rows.data() + row * kTerms, *b = cols.data() + col * kTerms;
      float sum = 0.0f;
      for (int k = 0; k < kTerms; ++k) sum += a[k] * b[k];
      found[col * kRows + row] = sum;
    }
  }
  return found;
}

// A thread's share of the next product of its group, which the first thread to come makes for all.
void make_product(const Product& p, Thread& own, Group& group) {
  const int thread = cuda_host::thread_of_cluster(), lane = thread % 32, warp = thread % kWarpgroup / 32;
  const int64_t number = own.made++;
  std::vector<float>& found = group.products[number];
  if (found.empty()) {
    found = product_of(p, cuda_host::shared_memory_of(block()));
    group.products.erase(group.products.begin(), group.products.lower_bound(number - 64));
  }
  for (int each = 0; each < p.n / 2; ++each) {
    const int col = each / 4 * 8 + lane % 4 * 2 + each % 2, row = 16 * warp + lane / 4 + each / 2 % 2 * 8;
    p.sums[each] = found[col * 64 + row] + (p.adds ? p.sums[each] : 0.0f);
  }
}

}  // namespace

// ---- Barriers -------------------------------------------------------------------------------------------------------

void barrier_init(uint64_t* barrier, int arrivals) {
  cluster().barriers[{block(), offset_of(barrier)}] = {arrivals, arrivals, 0, 0, false};
}

void fence_barrier_init() {
  for (auto& [at, barrier] : cluster().barriers) barrier.known |= at.first == block();
}

void barrier_expect(uint64_t* barrier, int bytes) {
  Barrier& own = barrier_at(block(), barrier);
  own.bytes += bytes, --own.missing;
  own.settle();
}

void barrier_arrive_at(uint64_t* barrier, int other) {
  Barrier& its = known_barrier_at(other, barrier);
  --its.missing;
  its.settle();
}

void barrier_wait(uint64_t* barrier, int parity) {
  const Barrier& own = barrier_at(block(), barrier);
  cuda_host::wait_until("barrier_wait", [&own, parity] { return own.phase != parity; });
}

void cluster_sync() {
  const int threads = cuda_host::cluster_blocks() * static_cast<int>(blockDim.x);
  meet(cluster().everybody, threads, true, "cluster_sync");
}

int cluster_rank() { return block(); }

void named_sync(int id, int threads) {
  if (id < 0 || id >= kNames) fail("there are 16 named barriers");
  meet(cluster().named[{block(), id}], threads, true, "named_sync");
}

void named_arrive(int id, int threads) {
  if (id < 0 || id >= kNames) fail("there are 16 named barriers");
  meet(cluster().named[{block(), id}], threads, false, "named_arrive");
}

void change_registers(int count, bool takes) {
  if (count % 8 != 0 || count < 24 || count > 256) fail("a thread has 24 to 256 registers, in steps of 8");
  Group& group = own_group();
  meet(group.meeting, kWarpgroup, true, "setmaxnreg");
  int& left = cluster().left[block()];
  if (takes) cuda_host::wait_until("take_registers", [&] { return left >= count - group.registers; });
  left += group.registers - count;
  if (takes ? count < group.registers : count > group.registers)
    fail("registers are taken and given the other way round");
  group.registers = count;
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

void load_tile_to(const TensorMap* map, void* to, uint64_t* barrier, int col, int row, uint16_t blocks) {
  const TensorMap from = *map;
  const uint32_t tile = tile_offset(to, from.tile_rows);
  for (int other = 0; other < cuda_host::cluster_blocks(); ++other) {
    if ((blocks >> other & 1) == 0) continue;
    Barrier& its = known_barrier_at(other, barrier);
    each_number(from, col, row, tile,
                [&](const unsigned char*, uint32_t at) { memset(cuda_host::shared_memory_of(other) + at, 0xff, 2); });
    cuda_host::later([=, &its] {
      if (cuda_host::has_ended(other)) fail("a block ends before a tile has arrived");
      each_number(from, col, row, tile, [&](const unsigned char* number, uint32_t at) {
        constexpr unsigned char zero[2] = {};
        memcpy(cuda_host::shared_memory_of(other) + at, number == nullptr ? zero : number, 2);
      });
      its.bytes -= int64_t{from.tile_rows} * kRowBytes;
      its.settle();
    });
  }
}

// Behind what else happens, and what happens after that: whoever does not wait for a store finds it unread.
static void much_later(const std::function<void()>& event, int turns = 32) {
  cuda_host::later([=] { turns == 0 ? event() : much_later(event, turns - 1); });
}

void fence_async() {
  auto& writes = cluster().writes[block()];
  const int own = cuda_host::thread_of_cluster();
  for (auto at = writes.begin(); at != writes.end();) at = at->second == own ? writes.erase(at) : std::next(at);
}

void store_tile(const TensorMap* map, const void* from, int col, int row) {
  const TensorMap to = *map;
  const uint32_t tile = tile_offset(from, to.tile_rows);
  const int own = block();
  const auto& writes = cluster().writes[own];
  const auto unfenced = writes.lower_bound(tile);
  if (unfenced != writes.end() && unfenced->first < tile + static_cast<uint32_t>(to.tile_rows * kRowBytes)) {
    fail("a store reads what a thread wrote and did not fence");
  }
  const auto store = std::make_shared<Store>();
  self().stores.push_back(store);
  much_later([=] {
    if (cuda_host::has_ended(own)) fail("a block ends before its store has been read");
    const auto numbers = std::make_shared<std::vector<std::pair<unsigned char*, uint16_t>>>();
    each_number(to, col, row, tile, [&](unsigned char* number, uint32_t at) {
      uint16_t bits;
      memcpy(&bits, cuda_host::shared_memory_of(own) + at, sizeof(bits));
      if (number != nullptr) numbers->emplace_back(number, bits);
    });
    store->read = true;
    cuda_host::later([=] {
      for (const auto& [number, bits] : *numbers) memcpy(number, &bits, sizeof(bits));
      store->written = true;
    });
  });
}

void store_commit() {
  for (const auto& store : self().stores) store->committed = true;
}

void store_wait_read() {
  const auto stores = self().stores;
  cuda_host::wait_until("store_wait_read", [stores] {
    for (const auto& store : stores) {
      if (store->committed && !store->read) return false;
    }
    return true;
  });
}

void store_wait() {
  const auto stores = self().stores;
  cuda_host::wait_until("store_wait", [stores] {
    for (const auto& store : stores) {
      if (store->committed && !store->written) return false;
    }
    return true;
  });
}

void store_matrices(void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint64_t* rows = cuda_host::exchange(0xffffffffu, offset_of(at), "store_matrices");
  const uint32_t pairs[4] = {a, b, c, d};
  const int lane = static_cast<int>(cuda_host::lane());
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto row = static_cast<uint32_t>(rows[matrix * 8 + lane / 4]);
    if (row % 16 != 0) fail("a row of a matrix must be 16-byte aligned");
    memcpy(cuda_host::shared_memory_of(block()) + row + lane % 4 * 4, &pairs[matrix], 4);
    cluster().writes[block()][row + static_cast<uint32_t>(lane) % 4 * 4] = cuda_host::thread_of_cluster();
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------

uint64_t tile_descriptor(const void* at) {
  return (uint64_t{offset_of(at)} & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

void mma_fence() { self().fenced = true; }

void add_product(float* sums, int n, uint64_t of_rows, uint64_t of_cols, bool adds, Widen widen) {
  if (!self().fenced) fail("products begin without mma_fence");
  const auto start = [](uint64_t descriptor) {
    if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 1024 >> 4) fail("a descriptor of another layout");
    return static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  };
  self().groups.back().push_back({sums, n, start(of_rows), start(of_cols), adds, widen});
}

void mma_commit() { self().groups.emplace_back(); }

void wait_for_products(int count) {
  Thread& own = self();
  meet(own_group().meeting, kWarpgroup, true, "mma_wait");
  while (static_cast<int>(own.groups.size()) - 1 > count) {
    for (const Product& product : own.groups.front()) make_product(product, own, own_group());
    own.groups.pop_front();
  }
  // Registers may be looked at, and need a fence before they are added to again.
  if (count == 0) own.fenced = false;
  meet(own_group().meeting, kWarpgroup, true, "mma_wait");
}

}  // namespace contrastive_ops::hopper
