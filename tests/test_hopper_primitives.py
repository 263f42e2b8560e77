"""The instructions of Hopper: each does what it should, and on the host what is wrong in a kernel shows.

Every test runs small kernels with each order of threads and of what is done aside of them: copies that arrive at once,
late, or at any time. On such a GPU those without a defect run there instead.
"""

import os
import shutil
import subprocess
import textwrap

import cuda_host
import pytest
import torch

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not ON_GPU and cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

SCHEDULES = ("gpu",) if ON_GPU else ("ascending", "descending", "shuffled")
on_host = pytest.mark.skipif(ON_GPU, reason="a GPU may hang where the host says what is wrong")


def filled(body, *parts):
    """A body with a part in the place of each @."""
    for part in parts:
        body = body.replace("@", part, 1)
    return body


# Bodies of kernels, by name. Each has a cluster of two blocks, of 128 threads or as THREADS says, with memory
# for a tile of 128 rows and for four barriers; one thread has made `barrier[0]` for one arrival, `barrier[1]` for two.
# `in` is a matrix of 200 x 96 in bfloat16, of which number (i, j) is (7 i + 3 j) % 13 - 6; `out` has 2 x 128 x 192
# floats, and what is stored goes to a matrix of 200 x 96 in bfloat16 of -1.
THREADS = {"ping_pong": 384, "registers": 384, "registers_that_nobody_left": 384}
LOAD = """
    if (threadIdx.x == 0) {
      barrier_expect(&s.barrier[0], 128 * 128);
      load_tile(&in, s.tile, &s.barrier[0], 64 * rank, 100 * rank);
    }
    @
"""
READ = """
    for (int c = 0; c < 64; ++c) {
      const int row = threadIdx.x, at = row * 64 + ((c / 8) ^ (row % 8)) * 8 + c % 8;
      out[(rank * 128 + row) * 192 + c] = to_float(s.tile[at]);
    }
"""
WAIT = "barrier_wait(&s.barrier[0], 0);"
MULTICAST = """
    if (threadIdx.x == 0) {
      barrier_expect(&s.barrier[0], @ * 128);
      load_tile_to(&half, s.tile + rank * 64 * 64, &s.barrier[0], 0, 64 * rank, 3);
    }
    barrier_wait(&s.barrier[0], 0);
"""
# Rows 0 to 63 of a tile times all 128 of it.
MULTIPLY = (
    filled(LOAD, WAIT)
    + """
    float sums[64];
    @
    for (int k = 0; k < 4; ++k) {
      mma<BFloat16, 128>(sums, tile_descriptor(s.tile + 16 * k), tile_descriptor(s.tile + 16 * k), k > 0);
    }
    mma_commit();
    @
    for (int k = 0; k < 64; ++k) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + k / 2 % 2 * 8;
      const int col = k / 4 * 8 + threadIdx.x % 4 * 2 + k % 2;
      out[(rank * 128 + row) * 192 + col] = sums[k];
    }
"""
)
# Two tiles leave one after the other through the same memory.
STORE = """
    for (int round = 0; round < 2; ++round) {
      @
      named_sync(1, 128);
      for (int m = 0; m < 2; ++m) {
        for (int n = 0; n < 8; n += 2) {
          const int lane = threadIdx.x % 32, row = m * 64 + threadIdx.x / 32 * 16 + lane % 16;
          uint32_t pairs[4];
          for (int q = 0; q < 4; ++q) {
            const int i = m * 64 + threadIdx.x / 32 * 16 + lane / 4 + q % 2 * 8, j = (n + q / 2) * 8 + lane % 4 * 2;
            pairs[q] = rounded_pair<BFloat16>(round * 100 + i % 50 + rank, round * 100 + j);
          }
          store_matrices(s.tile + row * 64 + ((n + lane / 16) ^ (row % 8)) * 8, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
      @
      named_sync(1, 128);
      if (threadIdx.x == 0) {
        store_tile(&to, s.tile, 64 * round, 128 * rank);
        @
      }
    }
    @
"""
READ_BEFORE = "if (threadIdx.x == 0) store_wait_read();"
WRITTEN = "if (threadIdx.x == 0) store_wait();"
STORE_PARTS = (READ_BEFORE, "fence_async();", "store_commit();", WRITTEN)


def without(part):
    """STORE without one of its parts."""
    return filled(STORE, *("" if each == part else each for each in STORE_PARTS))


# Rows, columns and the width of tiles of a sweep, and its first row where it is above the diagonal.
PLANS = [
    (2500, 2900, 192, -1),
    (2500, 2500, 192, 0),
    (700, 2900, 128, 512),
    (700, 1900, 192, 768),
    (1, 1, 192, 0),
    (5000, 5000, 128, 0),
]

KERNELS = {
    "load": filled(LOAD, WAIT) + READ,
    "load_without_a_wait": filled(LOAD, "") + READ,
    "load_with_the_other_parity": filled(LOAD, "barrier_wait(&s.barrier[0], 1);") + READ,
    "load_of_more_bytes_than_announced": filled(LOAD.replace("128 * 128", "128 * 64"), WAIT) + READ,
    "load_of_fewer_bytes_than_announced": filled(LOAD.replace("128 * 128", "129 * 128"), WAIT) + READ,
    "load_into_a_misaligned_tile": filled(LOAD.replace("s.tile,", "s.tile + 64,"), WAIT),
    "load_that_nobody_waits_for": filled(LOAD, ""),
    "multicast": filled(MULTICAST, "128") + READ + "cluster_sync();",
    "multicast_of_which_half_is_awaited": filled(MULTICAST, "64") + READ + "cluster_sync();",
    "multiply": filled(MULTIPLY, "mma_fence();", "mma_wait<0>();"),
    "multiply_without_a_fence": filled(MULTIPLY, "", "mma_wait<0>();"),
    "multiply_without_a_wait": filled(MULTIPLY, "mma_fence();", ""),
    "multiply_with_a_wait_for_none": filled(MULTIPLY, "mma_fence();", "mma_wait<1>();"),
    "tile_that_is_overwritten_while_it_is_multiplied": filled(
        MULTIPLY,
        "mma_fence();",
        """
        if (threadIdx.x == 0) load_tile(&in, s.tile, &s.barrier[0], 0, 0);

        mma_wait<0>();
        if (threadIdx.x == 0) barrier_expect(&s.barrier[0], 128 * 128);
        barrier_wait(&s.barrier[0], 1);
        """,
    ),
    "store": without(None),
    "store_without_a_fence": without("fence_async();"),
    "store_into_memory_that_was_not_read": without(READ_BEFORE),
    "store_that_was_not_committed": without("store_commit();"),
    "store_that_nobody_waits_for": without(WRITTEN),
    # Group 1 writes for group 2 and the other way round, in turns.
    "ping_pong": """
        const int group = threadIdx.x / 128, lane = threadIdx.x % 128;
        if (group == 0) return;
        if (group == 2) named_arrive(1, 256);
        float seen = 0.0f;
        for (int turn = group - 1; turn < 6; turn += 2) {
          named_sync(group, 256);
          seen = seen * 10 + s.number[(lane + 1) % 128];
          named_sync(2 + group, 128);
          s.number[lane] = turn + 1;
          named_arrive(3 - group, 256);
        }
        out[rank * 256 + (group - 1) * 128 + lane] = seen;
    """,
    "registers": """
        if (threadIdx.x < 128) give_registers<24>(); else take_registers<240>();
        if (threadIdx.x == 0) out[rank] = 1;
    """,
    "registers_that_nobody_left": "if (threadIdx.x >= 128) take_registers<240>();",
    "cluster": """
        if (threadIdx.x < 1) barrier_arrive_at(&s.barrier[1], 1 - rank), barrier_arrive_at(&s.barrier[1], rank);
        barrier_wait(&s.barrier[1], 0);
        cluster_sync();
        if (threadIdx.x == 0) out[rank] = 1;
    """,
    "one_arrival_of_two": """
        if (threadIdx.x < 1) barrier_arrive_at(&s.barrier[1], rank);
        barrier_wait(&s.barrier[1], 0);
    """,
    "barrier_that_was_not_made": "if (threadIdx.x == 0) barrier_arrive_at(&s.barrier[2], rank);",
    "barrier_that_was_not_fenced": """
        if (threadIdx.x == 0) {
          barrier_init(&s.barrier[2], 1);
          barrier_arrive_at(&s.barrier[2], rank);
        }
    """,
    "threads_that_count_differently": "named_sync(1, threadIdx.x < 64 ? 128 : 64);",
    "numbers": """
        if (threadIdx.x == 0) {
          out[rank * 4] = fast_exp2(-3.0f), out[rank * 4 + 1] = fast_inverse(8.0f);
          out[rank * 4 + 2] = fast_log2(0.25f);
          out[rank * 4 + 3] = rounded_pair<Float16>(1.0f, -2.0f) == 0xc0003c00u;
        }
    """,
    # Tiles in the order in which a sweep goes through them.
    "places": """
        if (threadIdx.x == 0 && rank == 0) {
          for (const Plan& plan : {PLANS}) {
            *out++ = plan.tiles();
            for (int at = 0; at < plan.tiles(); ++at) {
              const TilePlace tile(plan, at, 1);
              *out++ = tile.row_tile, *out++ = tile.col_tile;
            }
            for (int tile = 0; tile < plan.col_tiles; ++tile) *out++ = Span(plan, true, tile * plan.tile_cols).end;
          }
        }
    """.replace("PLANS", ", ".join(f"Plan({rows}, {cols}, 64, {tile}, {first})" for rows, cols, tile, first in PLANS)),
}

# Those without a defect.
RIGHT = ("load", "multicast", "multiply", "store", "ping_pong", "registers", "cluster", "numbers")

MAIN = """
    #include <vector>
    #include "hopper/sweep.h"
    namespace contrastive_ops::hopper::test {
    #ifdef __CUDACC__
    template <class T>
    T* on_device(const std::vector<T>& from) {
      void* to = nullptr;
      check_cuda(cudaMalloc(&to, from.size() * sizeof(T)));
      check_cuda(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyDefault));
      return static_cast<T*>(to);
    }
    template <class T>
    void take_back(std::vector<T>& to, const T* from) {
      check_cuda(cudaMemcpy(to.data(), from, to.size() * sizeof(T), cudaMemcpyDefault));
    }
    inline void set_schedule(const std::string&) {}
    #else
    template <class T>
    T* on_device(std::vector<T>& from) {
      return from.data();
    }
    template <class T>
    void take_back(std::vector<T>&, const T*) {}
    inline void set_schedule(const std::string& name) {
      using cuda_host::Schedule;
      cuda_host::set_schedule(name == "shuffled"     ? Schedule::shuffled
                              : name == "descending" ? Schedule::descending
                                                     : Schedule::ascending, 1);
    }
    #endif
    struct alignas(1024) Shared {
      BFloat16 tile[128 * 64];
      uint64_t barrier[4];
      float number[128];
    };
    constexpr int kRows = 200, kCols = 96, kNumbers = 2 * 128 * 192;
    %s
    template <class Kernel>
    void run(Kernel kernel, int threads) {
      std::vector<BFloat16> in(kRows * kCols), stored(kRows * kCols, from_float<BFloat16>(-1.0f));
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) in[i * kCols + j] = from_float<BFloat16>((7 * i + 3 * j) %% 13 - 6);
      }
      std::vector<float> out(kNumbers, -1.0f);
      BFloat16 *const in_there = on_device(in), *const stored_there = on_device(stored);
      float* const out_there = on_device(out);
      const auto map = [](const BFloat16* of, int rows) {
        return tensor_map(of, DType::bfloat16, kRows, kCols, kCols, rows);
      };
      launch_clusters(kernel, 1, threads, sizeof(Shared), nullptr, map(in_there, 128), map(in_there, 64),
                      map(stored_there, 128), out_there);
      take_back(out, out_there);
      take_back(stored, stored_there);
      for (const float each : out) printf("%%g ", each);
      for (const BFloat16 each : stored) printf("%%g ", to_float(each));
    }
    }  // namespace contrastive_ops::hopper::test
    int main(int, char** words) {
      using namespace contrastive_ops::hopper::test;
      const std::string name = words[1];
      set_schedule(words[2]);
      %s
    }
"""
KERNEL = """
    __global__ void __launch_bounds__(384, 1)
    %s(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap half,
                       const __grid_constant__ TensorMap to, float* out) {
      auto& s = shared_tiles<Shared>();
      const int rank = cluster_rank();
      (void)in, (void)half, (void)to, (void)out, (void)rank;
      if (threadIdx.x == 0) {
        barrier_init(&s.barrier[0], 1);
        barrier_init(&s.barrier[1], 2);
        fence_barrier_init();
      }
      for (int k = threadIdx.x; k < 128; k += blockDim.x) s.number[k] = 0.0f;
      cluster_sync();
      %s
    }
"""


def source(names):
    """A file with kernels, and a program that runs the one it is told."""
    bodies = "\n".join(KERNEL % (name, KERNELS[name]) for name in names)
    calls = "\n".join(f'if (name == "{name}") run({name}, {THREADS.get(name, 128)});' for name in names)
    return textwrap.dedent(MAIN % (bodies, calls))


def compile_for_gpu(path, program):
    """By the nvcc that is here.

    Raises:
        RuntimeError: with the compiler's message.
    """
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-gencode=arch=compute_90a,code=sm_90a",
        f"-I{cuda_host.SOURCES}",
    ]
    done = subprocess.run([*command, path, "-o", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    path, made = folder / "kernels.cu", folder / "program"
    path.write_text(source(RIGHT if ON_GPU else KERNELS))
    if ON_GPU:
        compile_for_gpu(path, made)
    else:
        others = [cuda_host.HERE / f"{name}.cpp" for name in ("cuda_host", "hopper_host")]
        cuda_host.compile_program([path, *others], made)
    return made


def run(program, name, schedule):
    """(whether it ended well, the numbers of `out` and of `stored`, what it said)."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, name, schedule], env=environment, capture_output=True, text=True, check=False)
    numbers = [float(each) for each in done.stdout.split()]
    return done.returncode == 0, (numbers[: 2 * 128 * 192], numbers[2 * 128 * 192 :]), done.stderr


def right(program, name):
    """What a kernel without defects writes, which is the same in every order."""
    found = []
    for schedule in SCHEDULES:
        fine, numbers, said = run(program, name, schedule)
        assert fine, said
        found.append(numbers)
    assert all(each == found[0] for each in found)
    return found[0]


def number(i, j):
    """Of the matrix that kernels read."""
    return (7 * i + 3 * j) % 13 - 6 if i < 200 and j < 96 else 0


def test_a_tile_is_read_swizzled_and_what_is_outside_is_zero(program):
    out, _ = right(program, "load")
    for rank in range(2):
        for row in range(128):
            expected = [number(100 * rank + row, 64 * rank + c) for c in range(64)]
            assert out[(rank * 128 + row) * 192 :][:64] == expected


def test_each_block_gets_both_halves(program):
    out, _ = right(program, "multicast")
    for rank in range(2):
        for row in range(128):
            assert out[(rank * 128 + row) * 192 :][:64] == [number(row, c) for c in range(64)]


def test_a_tile_is_multiplied(program):
    out, _ = right(program, "multiply")
    for rank in range(2):
        rows = [[number(100 * rank + i, 64 * rank + c) for c in range(64)] for i in range(128)]
        for i in range(64):
            expected = [sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in range(128)]
            assert out[(rank * 128 + i) * 192 :][:128] == expected


def test_tiles_are_stored_one_after_another(program):
    _, stored = right(program, "store")
    for i in range(200):
        for j in range(96):
            row, round_, col = i % 128, j // 64, j % 64
            # Even columns hold the row, odd ones the column before.
            expected = round_ * 100 + (row % 50 + i // 128 if col % 2 == 0 else col - 1)
            assert stored[i * 96 + j] == expected


@pytest.mark.skipif(ON_GPU, reason="plans are made by the host")
def test_tiles_that_a_sweep_goes_through(program):
    """Each once: all, or, of a matrix compared with itself, those with a pair on the diagonal or above it."""
    found = [int(each) for each in right(program, "places")[0]]
    for rows, cols, width, first in PLANS:
        across, pairs = -(-cols // width), -(-rows // 256)
        expected = [
            (p, c) for p in range(pairs) for c in range(across) if first < 0 or (c + 1) * width > first + 256 * p
        ]
        count, tiles = found[0], found[1 : 1 + 2 * found[0]]
        assert all(row % 2 == 1 for row in tiles[::2])  # of the second block of a cluster
        assert count == len(expected)
        assert sorted((row // 2, col) for row, col in zip(tiles[::2], tiles[1::2], strict=True)) == expected
        of_columns, found = found[1 + 2 * count :][:across], found[1 + 2 * count + across :]
        assert of_columns == [2 * sum(col == c for _, col in expected) for c in range(across)]


def test_groups_take_turns(program):
    out, _ = right(program, "ping_pong")
    for rank in range(2):
        assert out[rank * 256 :][:128] == [24.0] * 128  # 0, 2 and 4 written by the other group
        assert out[rank * 256 + 128 :][:128] == [135.0] * 128


@pytest.mark.parametrize("name", ["registers", "cluster"])
def test_what_others_leave_and_where_all_meet(name, program):
    assert right(program, name)[0][:2] == [1.0, 1.0]


def test_numbers(program):
    assert right(program, "numbers")[0][:8] == [0.125, 0.125, -2.0, 1.0] * 2


SILENT = {
    "load_without_a_wait": "load",
    "load_with_the_other_parity": "load",
    "multicast_of_which_half_is_awaited": "multicast",
    "multiply_without_a_wait": "multiply",
    "multiply_with_a_wait_for_none": "multiply",
    "tile_that_is_overwritten_while_it_is_multiplied": "multiply",
    "store_into_memory_that_was_not_read": "store",
    "store_that_was_not_committed": "store",
}


@on_host
@pytest.mark.parametrize("name", SILENT)
def test_a_missing_wait_shows_in_some_order(name, program):
    """As other numbers, or as an end before time."""
    expected = right(program, SILENT[name])
    found = [run(program, name, schedule) for schedule in SCHEDULES]
    assert any(not fine or not same(numbers, expected) for fine, numbers, _ in found)


def same(a, b):
    """Whether all numbers are equal; NaN is not."""
    return all(x == y for left, right_ in zip(a, b, strict=True) for x, y in zip(left, right_, strict=True))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_takes_the_same_kernels(tmp_path):
    """What a GPU would run; products of warpgroups that it would make one by one are a message of C75xx."""
    (tmp_path / "kernels.cu").write_text(source(RIGHT))
    compile_for_gpu(tmp_path / "kernels.cu", tmp_path / "program")


MESSAGES = {
    "load_of_more_bytes_than_announced": "a barrier gets more bytes than were announced",
    "load_of_fewer_bytes_than_announced": "threads wait for each other",
    "load_into_a_misaligned_tile": "a tile must begin at a multiple of 1024 bytes",
    "load_that_nobody_waits_for": "a block ends before a tile has arrived",
    "multiply_without_a_fence": "products begin without mma_fence",
    "store_without_a_fence": "a store reads what a thread wrote and did not fence",
    "store_that_nobody_waits_for": "a block ends before its store has been read",
    "registers_that_nobody_left": "threads wait for each other",
    "one_arrival_of_two": "threads wait for each other",
    "barrier_that_was_not_made": "a barrier is used that was not made",
    "barrier_that_was_not_fenced": "a barrier is used that was not fenced after it was made",
    "threads_that_count_differently": "threads meet at a barrier with other counts",
}


@on_host
@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_wrong_is_told(name, program):
    found = [run(program, name, schedule) for schedule in SCHEDULES]
    assert any(not fine and MESSAGES[name] in said for fine, _, said in found), [said for *_, said in found]
