"""Kills, full disks, no memory, Ctrl-C, forks, many threads, calls from hooks, another interpreter.

What may end a process happens in a child. Times are the processor's, of the thread that waits: other load does not
lengthen them.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from contrastive_ops import clip, route, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.losses import info_nce
from contrastive_ops.mining import MemoryBank, search, streaming
from contrastive_ops.mining import bank as bank_of_memory

compiled = pytest.mark.skipif(extension.load() is None, reason=str(extension.why_missing()))
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and clocks of Linux")


def child(code, *arguments, seconds=300):
    """What a script prints; an error where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- A process that ends, a disk that is full ------------------------------------------------------------------------

SEARCH = """
import sys, torch
from contrastive_ops.mining import TopKState, search, streaming
streaming.CHECKPOINT_SECONDS = 0.0
torch.manual_seed(0)
query, rows = torch.randn(5, 8), torch.randn(4000, 8)
def tell(done, total):
    print(done, flush=True)
    if len(sys.argv) > 2:
        input()
found = search(query, rows, 7, block_rows=200, checkpoint=sys.argv[1], progress=tell, backend="reference")
torch.save((found.values, found.indices), sys.argv[1] + ".found")
"""


def test_a_search_that_is_killed_goes_on_and_searches_nothing_twice(tmp_path):
    """SIGKILL after some blocks, each of which was written; also in the middle of a write that is not the first."""
    file = tmp_path / "search.pt"
    done = 0
    for blocks in (1, 2, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", SEARCH, str(file), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(blocks):
            told = int(process.stdout.readline())
            assert told == done + 200  # nothing lost, nothing twice
            done = told
            process.stdin.write("\n")
            process.stdin.flush()
        # The next block has been begun; it is told of after it was written.
        done = int(process.stdout.readline())
        process.kill()
        process.communicate()
    part = tmp_path / "search.pt.999.part"
    part.write_bytes(file.read_bytes()[:100])  # what a kill in the middle of a write leaves
    told = [int(line) for line in child(SEARCH, file).split()]
    assert told == list(range(done + 200, 4001, 200))
    torch.manual_seed(0)
    query, rows = torch.randn(5, 8), torch.randn(4000, 8)
    assert same(
        torch.load(f"{file}.found", weights_only=True), similarity_topk(query, rows, 7, backend="reference")[:2]
    )


WRITE = """
import os
usual = os.fsync
def wait(number):
    print("writing", os.listdir(os.path.dirname(sys.argv[1])), flush=True)
    input()
    usual(number)
"""


def test_a_search_that_is_killed_while_it_writes_keeps_the_write_before(tmp_path):
    """SIGKILL between the last byte of the second checkpoint and its name."""
    file = tmp_path / "search.pt"
    script = WRITE + SEARCH.replace("torch.manual_seed(0)", "os.fsync = wait\ntorch.manual_seed(0)", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("writing") and not file.exists()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "200\n"
    said = process.stdout.readline()
    process.kill()
    process.communicate()
    assert said.startswith("writing") and "search.pt'" in said and len(os.listdir(tmp_path)) == 2
    told = [int(line) for line in child(SEARCH, file).split()]
    assert told == list(range(400, 4001, 200))  # from what the first write knew
    torch.manual_seed(0)
    query, rows = torch.randn(5, 8), torch.randn(4000, 8)
    found = torch.load(f"{file}.found", weights_only=True)
    assert same(found, similarity_topk(query, rows, 7, backend="reference")[:2])


MINE = """
import sys, torch
from contrastive_ops.mining import NegativeRules, mine_hard_negatives, streaming
streaming.CHECKPOINT_SECONDS = 0.0
def mined(file, tell):
    generator = torch.Generator().manual_seed(0)
    query, rows = (torch.randn(n, 8, generator=generator) for n in (5, 4000))
    rules = NegativeRules(relative_margin=0.05, near_duplicate=0.6)
    return mine_hard_negatives(
        query, rows, torch.arange(5), 7, rules=rules, block_rows=200, checkpoint=file, progress=tell
    )
def tell(done, total):
    print(done, flush=True)
    input()
if __name__ == "__main__":
    mined(sys.argv[1], tell)
"""


def test_mining_that_is_killed_goes_on_and_finds_what_it_would_have_found(tmp_path):
    """SIGKILL after a few blocks of the corpus; negatives, scores and statistics are those of a run without it."""
    file = tmp_path / "mined.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", MINE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        told = int(process.stdout.readline())
        process.stdin.write("\n")
        process.stdin.flush()
    assert int(process.stdout.readline()) == told + 200 == 800  # the next block was written, too
    process.kill()
    process.communicate()
    script, seen = {"__name__": "script"}, []
    exec(MINE, script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHECKPOINT_SECONDS", 0.0)
        found = script["mined"](file, lambda done, total: seen.append(done))
        whole = script["mined"](None, lambda done, total: None)
    # The first pass goes on behind what was written; later ones, for lists that were too short, begin anew.
    assert seen[:16] == list(range(1000, 4001, 200))
    lists = [(each.indices, each.scores, each.counts) for each in (found, whole)]
    assert same(*lists) and (found.indices >= 0).all()
    assert {name: each.tolist() for name, each in found.statistics.items()} == {
        name: each.tolist() for name, each in whole.statistics.items()
    }


FULL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
before = open(sys.argv[1], "rb").read()
try:
    exec(sys.argv[3], {"sys": sys})
except (OSError, RuntimeError) as error:
    print("refused", type(error).__name__)
assert open(sys.argv[1], "rb").read() == before
print(sorted(os.listdir(os.path.dirname(sys.argv[1]))))
"""


@linux
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    file = tmp_path / "search.pt"
    short = SEARCH.replace("def tell", "class Stop(Exception): pass\ndef tell").replace(
        "        input()", "        raise Stop"
    )
    with pytest.raises(AssertionError, match="Stop"):
        child(short, file, "stop")
    size = file.stat().st_size
    for limit in (100, size - 1):
        said = child(FULL, file, limit, SEARCH)
        assert said.splitlines()[-2:] == [said.splitlines()[-2], "['search.pt']"] and "refused" in said
    assert [int(line) for line in child(SEARCH, file).split()][0] == 400


# ---- No memory -----------------------------------------------------------------------------------------------------

MEMORY = """
import resource, torch
from contrastive_ops import clip, route, similarity_topk
from contrastive_ops.core import extension
from contrastive_ops.mining import MemoryBank, TopKState
torch.set_num_threads(2)
torch.manual_seed(0)
x, y = torch.randn(6000, 32), torch.randn(6000, 32)
bank, state = MemoryBank(100, 32), TopKState(x, 500)
bank.enqueue(x[:60])
logits = torch.randn(200_000, 16)
def loss(): return clip(x.requires_grad_(), y, scale=5.0)
def gradient(): return torch.autograd.grad(clip(x.requires_grad_(), y, scale=5.0), [x])[0]
calls = {
    "loss": loss, "gradient": gradient,
    "topk": lambda: similarity_topk(x.detach(), y, 500).indices,
    "route": lambda: route(logits, 4, capacity=1.0).gates,
    "update": lambda: state.begun_anew().merge(updated()).finalize().indices,
    "bank": lambda: bank.topk(x.detach(), 90).indices,
}
def updated():
    other = state.begun_anew()
    other.update(y, 0)
    return other
expected = {name: call().clone() for name, call in calls.items()}
entries = [t.clone() for t in bank.state_dict().values()]
def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
refused = 0
for extra in (0, 1 << 20, 4 << 20, 16 << 20, 48 << 20):
    for name, call in calls.items():
        if extension.load() is not None: extension.load().release_scratch()
        resource.setrlimit(resource.RLIMIT_AS, (used() + extra, resource.RLIM_INFINITY))
        try:
            call()
        except (MemoryError, RuntimeError):
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert torch.equal(call(), expected[name]), name
assert all(torch.equal(a, b) for a, b in zip(bank.state_dict().values(), entries))
print(refused)
"""


@compiled
@linux
def test_no_memory_in_the_middle_leaves_nothing_broken():
    assert int(child(MEMORY)) >= 3


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

INTERRUPT = """
import os, signal, threading, time, torch
from contrastive_ops import clip, info_nce, ops, similarity_topk, similarity_reduce
from contrastive_ops.core import eager
from contrastive_ops.ops import grouped_matmul, maxsim, TokenSets
torch.set_num_threads(int(__import__("sys").argv[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
main = time.pthread_getcpuclockid(threading.get_ident())
x = torch.randn(60_000, 256)
leaf = x.clone().requires_grad_()
tokens = torch.randn(400, 64, 128)
a, b = torch.ones(200_000, 512), torch.ones(4, 512, 4096)
def dispatched():
    with eager.closed():
        clip(leaf, x, scale=5.0)
begun = False
def backward():
    global begun
    loss = similarity_reduce(leaf[:12_000], leaf[:12_000].detach()).sum()
    begun = True
    for _ in range(50): torch.autograd.grad(loss, leaf, retain_graph=True)
calls = {
    "direct": lambda: clip(leaf, x, scale=5.0),
    "dispatcher": dispatched,
    "backward": backward,
    "search": lambda: similarity_topk(x, x, 10),
    "tokens": lambda: maxsim(TokenSets(tokens), TokenSets(tokens)),
    "groups": lambda: grouped_matmul(a, b, torch.tensor([0, 50_000, 100_000, 150_000, 200_000])),
    "prefixes": lambda: ops.similarity_prefix(x, x, dims=(32, 128, 256)),
    "divergence": lambda: ops.similarity_distill(x, x, x, x),
    "values": lambda: ops.similarity_values(x, x, x),
}
def interrupt():
    while name == "backward" and not begun: time.sleep(0.01)
    began = time.clock_gettime(main)
    while time.clock_gettime(main) - began < 0.2: time.sleep(0.01)
    sent.append(time.clock_gettime(main))
    os.kill(os.getpid(), signal.SIGINT)
for name, call in calls.items():
    sent, timer = [], threading.Thread(target=interrupt)
    try:
        timer.start()
        call()
        timer.join()
        time.sleep(1)
        print(name, "ended")
    except KeyboardInterrupt:
        print(name, time.clock_gettime(main) - sent[0])
    timer.join()
small = torch.randn(30, 8)
assert torch.equal(clip(small, small, scale=2.0), clip(small, small, scale=2.0))
"""


@compiled
@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call_within_a_second(threads):
    took = dict(line.split() for line in child(INTERRUPT, threads, seconds=600).splitlines())
    assert len(took) == 9 and all(each != "ended" and float(each) < 1 for each in took.values()), took


# ---- Threads, forks, hooks -------------------------------------------------------------------------------------------

FORK = """
import os, signal, torch
from contrastive_ops import clip, similarity_topk
torch.set_num_threads(2)
x, y = torch.randn(700, 32), torch.randn(700, 32)
call = lambda: (clip(x, y, scale=3.0, backend="cpu"), similarity_topk(x, y, 5, backend="cpu").indices)
expected = call()
pid = os.fork()
if pid == 0:
    signal.alarm(100)
    found = call()
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected)) else 3)
status = os.waitpid(pid, 0)[1]
print("signal", os.WTERMSIG(status), "code", os.WEXITSTATUS(status))
"""


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_used_threads_goes_on_with_one():
    assert child(FORK) == "signal 0 code 0\n"


@pytest.fixture
def threads_of_torch():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_eight_threads_while_the_number_of_threads_changes(backend, threads_of_torch):
    torch.manual_seed(0)
    x, y, logits = torch.randn(150, 16), torch.randn(150, 16), torch.randn(300, 8)

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(clip(leaf, y, scale=3.0, backend=backend), [leaf])

    calls = [
        lambda: (clip(x, y, scale=3.0, backend=backend),),
        gradient,
        lambda: similarity_topk(x, y, 7, backend=backend)[:2],
        lambda: (route(logits, 2, backend=backend).gates,),
    ]
    expected = [call() for call in calls]
    stop = threading.Event()

    def turn():
        while not stop.is_set():
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                time.sleep(0.001)

    def work(number):
        return all(same(calls[(number + k) % 4](), expected[(number + k) % 4]) for k in range(12))

    turning = threading.Thread(target=turn)
    turning.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
    finally:
        stop.set()
        turning.join()


def test_calls_from_hooks(backend):
    """A hook on a gradient, one on a saved tensor and a progress function call the library again."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 8), torch.randn(40, 8)
    inner = info_nce(x, y, scale=2.0, backend=backend)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(clip(leaf, y, scale=3.0, backend=backend), [leaf])
    seen = []

    inside = []

    def again(*given):
        if not inside:  # the hook of saved tensors is called by what it calls, too
            inside.append(True)
            with torch.enable_grad():  # and without a graph
                own = x.clone().requires_grad_()
                info_nce(own, y, scale=2.0, backend=backend).backward()
            seen.append(torch.equal(info_nce(x, y, scale=2.0, backend=backend), inner))
            inside.clear()
        return given[0] if given else None

    leaf = x.clone().requires_grad_()
    leaf.register_hook(again)
    with torch.autograd.graph.saved_tensors_hooks(again, again):
        loss = clip(leaf, y, scale=3.0, backend=backend)
    loss.backward()
    assert torch.equal(leaf.grad, expected)
    whole = search(x, y, 3, block_rows=7, backend=backend)  # torch's products of other blocks may differ by rounding
    found = search(x, y, 3, block_rows=7, progress=lambda *_: again(search(x, y, 3, backend=backend)), backend=backend)
    assert same(found[:2], whole[:2]) and len(seen) > 3 and all(seen)


def test_an_exception_in_a_hook_leaves_the_next_call_right(backend):
    x, y = torch.randn(40, 8), torch.randn(40, 8)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(clip(leaf, y, scale=3.0, backend=backend), [leaf])

    def fail(gradient):
        raise KeyError("hook")

    handle = leaf.register_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        clip(leaf, y, scale=3.0, backend=backend).backward()
    handle.remove()
    leaf.grad = None
    clip(leaf, y, scale=3.0, backend=backend).backward()
    assert torch.equal(leaf.grad, expected)


def test_an_interrupted_enqueue_of_a_bank_is_seen_whole_or_not_at_all():
    """Ctrl-C before each line that the bank runs; the next batch is stored as if there had been no interrupt."""
    lines, wanted = [], 0

    def filled():
        bank = MemoryBank(5, 2)
        bank.enqueue(torch.arange(8.0).view(4, 2), torch.arange(4), torch.arange(4))
        return bank

    def entries(bank):
        return [value.clone() for value in bank.state_dict().values()]

    def watch(frame, event, argument):
        if frame.f_code.co_filename != bank_of_memory.__file__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == wanted:
                raise KeyboardInterrupt
        return watch

    rows = torch.arange(6.0).view(3, 2) - 9
    whole = filled()
    before = entries(whole)
    whole.enqueue(rows, torch.arange(3))
    for line in range(1, 200):
        wanted = line
        bank, usual = filled(), sys.gettrace()
        lines.clear()
        sys.settrace(watch)
        try:
            bank.enqueue(rows, torch.arange(3))
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(usual)
        assert same(entries(bank), before), lines[-1]
        bank.enqueue(rows, torch.arange(3))
        assert same(entries(bank), entries(whole)), lines[-1]
    assert wanted > 25 and same(entries(bank), entries(whole))


INTERPRETER = """
import _xxsubinterpreters as interpreters, sys
other = interpreters.create()
load = "import importlib.util as u; u.module_from_spec(u.spec_from_file_location('contrastive_ops._C', FILE))"
try:
    interpreters.run_string(other, load.replace("FILE", repr(sys.argv[1])))
    print("imported")
except interpreters.RunFailedError as error:
    print("refused", error)
import os, torch
from contrastive_ops import clip
clip(torch.randn(5, 3), torch.randn(5, 3), backend="cpu")
print("goes on", flush=True)
os._exit(0)
"""


@compiled
@pytest.mark.skipif(sys.version_info[:2] not in ((3, 10), (3, 11), (3, 12)), reason="another module makes interpreters")
def test_another_interpreter_is_refused():
    said = child(INTERPRETER, extension.load().__file__)
    assert said.startswith("refused") and "must be imported by the main interpreter" in said and "goes on" in said
