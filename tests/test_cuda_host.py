"""The execution of CUDA kernels on the host: what is wrong in a kernel shows.

Each test compiles a kernel that is wrong in one way and runs it with each order of threads.
"""

import itertools
import os
import subprocess
import textwrap

import cuda_host
import pytest

if cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

SCHEDULES = ("ascending", "descending", "shuffled")

# The bodies of kernels, by name. Each has two blocks of 64 threads with one integer of shared memory, and writes one
# integer, for each thread.
KERNELS = {
    # Each thread reads what its neighbour wrote.
    "with_barrier": """
        int* shared = shared_memory<int>();
        shared[threadIdx.x] = threadIdx.x;
        __syncthreads();
        out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
    """,
    "without_barrier": """
        int* shared = shared_memory<int>();
        shared[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
    """,
    # The second write may be seen by a thread that has not read the first.
    "without_second_barrier": """
        int* shared = shared_memory<int>();
        int sum = 0;
        for (int step = 0; step < 2; ++step) {
          shared[threadIdx.x] = step + 1;
          __syncthreads();
          sum = 10 * sum + shared[(threadIdx.x + 1) % blockDim.x];
        }
        out[threadIdx.x] = sum;
    """,
    "without_warp_barrier": """
        int* shared = shared_memory<int>();
        shared[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = shared[threadIdx.x ^ 1];
    """,
    "with_warp_barrier": """
        int* shared = shared_memory<int>();
        shared[threadIdx.x] = threadIdx.x;
        __syncwarp();
        out[threadIdx.x] = shared[threadIdx.x ^ 1];
    """,
    "beyond_global_memory": "out[threadIdx.x + 1] = 0;",
    "before_global_memory": "out[threadIdx.x] = out[int(threadIdx.x) - 1];",
    "beyond_shared_memory": "shared_memory<int>()[threadIdx.x + 1] = 0;",
    "reads_shared_memory_that_nobody_wrote": """
        const float value = shared_memory<float>()[threadIdx.x];
        out[threadIdx.x] = value != value;
    """,
    "all_lanes": "out[threadIdx.x] = __shfl_xor_sync(kFullWarp, int(threadIdx.x), 1);",
    "missing_lane": "if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(kFullWarp, int(threadIdx.x), 1);",
    "lane_that_is_not_named": "out[threadIdx.x] = __shfl_xor_sync(0xfu, int(threadIdx.x), 1);",
    "reads_from_a_lane_that_is_not_named": """
        const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
        out[threadIdx.x] = __shfl_xor_sync(mask, int(threadIdx.x), 16);
    """,
    "two_exchanges_at_once": """
        out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(kFullWarp, 1, 2) : __ballot_sync(kFullWarp, 1) != 0;
    """,
    "barrier_of_some_threads": """
        if (threadIdx.x < 40) {
          __syncthreads();
        } else {
          __syncwarp();
          if (threadIdx.x == 50) __shfl_sync(kFullWarp, 0, 0);
        }
    """,
    "aligned_pack": "out[threadIdx.x] = reinterpret_cast<const Pack16<int>*>(out)[threadIdx.x / 4].at[0];",
    "misaligned_pack": "out[threadIdx.x] = reinterpret_cast<const Pack16<int>*>(out + 1)[0].at[0];",
    "integer_atomics": "atomicAdd(out, 1);",
    "blocks": "if (threadIdx.x == 0) out[0] = blockIdx.x;",
}

MAIN = """
    #include "launch.h"
    namespace contrastive_ops {
    %s
    template <class Kernel>
    void run(Kernel kernel) {
      int* out = new int[kThreads]();
      launch(kernel, 2, kThreads, kThreads * sizeof(int), nullptr, out);
      for (int q = 0; q < kThreads; ++q) printf("%%d ", out[q]);
      delete[] out;
    }
    }  // namespace contrastive_ops
    int main(int, char** words) {
      using namespace contrastive_ops;
      using cuda_host::Schedule;
      const std::string name = words[1], schedule = words[2];
      cuda_host::set_schedule(schedule == "shuffled"     ? Schedule::shuffled
                              : schedule == "descending" ? Schedule::descending
                                                         : Schedule::ascending, 1);
      %s
    }
"""
THREADS = 64


def source(kernels):
    """A file with kernels, and a program that runs the one it is told."""
    bodies = [f"__global__ void {name}(int* out) {{ (void)out; {body} }}" for name, body in kernels.items()]
    calls = [f'if (name == "{name}") run({name});' for name in kernels]
    definitions = "\n".join([f"constexpr int kThreads = {THREADS};", *bodies])
    return textwrap.dedent(MAIN % (definitions, "\n".join(calls)))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_host")
    (folder / "kernels.cu").write_text(source(KERNELS))
    cuda_host.compile_program([folder / "kernels.cu", cuda_host.HERE / "cuda_host.cpp"], folder / "program")
    return folder / "program"


def run(program, name, schedule="ascending"):
    """(whether it ended well, the integers that it wrote, what it said)."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, name, schedule], env=environment, capture_output=True, text=True, check=False)
    return done.returncode == 0, [int(each) for each in done.stdout.split()], done.stderr


def outputs(program, name):
    """What a kernel writes, in each order of threads."""
    found = []
    for schedule in SCHEDULES:
        fine, integers, said = run(program, name, schedule)
        assert fine, said
        found.append(integers)
    return found


EXPECTED = {
    "with_barrier": [(q + 1) % THREADS for q in range(THREADS)],
    "with_warp_barrier": [q ^ 1 for q in range(THREADS)],
    "all_lanes": [q ^ 1 for q in range(THREADS)],
    "integer_atomics": [2 * THREADS] + [0] * (THREADS - 1),
    "aligned_pack": [0] * THREADS,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_kernel_without_defects_has_one_result(name, program):
    assert outputs(program, name) == [EXPECTED[name]] * len(SCHEDULES)


@pytest.mark.parametrize("name", ["without_barrier", "without_second_barrier", "without_warp_barrier", "blocks"])
def test_a_missing_barrier_gives_other_results_in_other_orders(name, program):
    """And so does what depends on which block comes last."""
    found = outputs(program, name)
    assert any(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["beyond_global_memory", "before_global_memory", "beyond_shared_memory"])
def test_what_reaches_beyond_its_memory_is_caught(name, schedule, program):
    fine, _, said = run(program, name, schedule)
    assert not fine and "AddressSanitizer: heap-buffer-overflow" in said
    assert "kernels.cu" in said  # it says where


def test_shared_memory_is_full_of_nan_at_first(program):
    assert outputs(program, "reads_shared_memory_that_nobody_wrote") == [[1] * THREADS] * len(SCHEDULES)


MESSAGES = {
    "missing_lane": "names a lane that has returned or is none",
    "lane_that_is_not_named": "must name the lane that calls it",
    "reads_from_a_lane_that_is_not_named": "reads from a lane that its mask does not name",
    "two_exchanges_at_once": "a barrier or an exchange is not reached by all",
    "barrier_of_some_threads": "a barrier or an exchange is not reached by all",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MESSAGES)
def test_threads_that_wait_for_each_other_are_told_so(name, schedule, program):
    fine, _, said = run(program, name, schedule)
    assert not fine and "cuda_host: " in said and MESSAGES[name] in said
    assert "(thread " in said  # it says which


def test_a_misaligned_pack_is_caught(program):
    fine, _, said = run(program, "misaligned_pack")
    assert not fine and "misaligned address" in said and "which requires 16 byte alignment" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("float* x = reinterpret_cast<float*>(out); atomicAdd(x, 1.0f);", "a float atomic gives another result"),
        ("static_assert(sizeof(Pack16<int>) == 16); __shfl_sync(kFullWarp, Pack16<int>{}, 0);", "at most 8 bytes"),
        ("__shared__ int memory[4]; out[0] = memory[0];", "__shared__"),
    ],
    ids=["float atomics", "a shuffle of 16 bytes", "static shared memory"],
)
def test_what_cannot_be_does_not_compile(body, message, tmp_path):
    (tmp_path / "wrong.cu").write_text(source({"wrong": body}))
    with pytest.raises(RuntimeError, match=message):
        cuda_host.compile_program([tmp_path / "wrong.cu"], tmp_path / "wrong")
