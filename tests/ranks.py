"""Processes of a gloo group that run functions of tests, started once for each size of the group."""

import atexit
import datetime
import functools
import itertools
import multiprocessing
import os
import tempfile
import traceback

_CONTEXT = multiprocessing.get_context("forkserver")
# All ranks are forked from one process that has imported what takes seconds.
_IMPORTED = ["torch.fx.experimental.symbolic_shapes", "torch.distributed.fsdp", "contrastive_ops.distributed"]
_CONTEXT.set_forkserver_preload(_IMPORTED)
_TIMEOUT = datetime.timedelta(seconds=60)
_NUMBERS = itertools.count()


class Ranks:
    """``Ranks(size).run(function, *arguments)`` calls ``function(rank, size, *arguments)`` on every rank."""

    def __init__(self, size, timeout=_TIMEOUT):
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        meeting = os.path.join(self.folder.name, f"meeting{next(_NUMBERS)}")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, rank, size, meeting, timeout), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments):
        """What the function returns on each rank; an error of any rank with its traceback."""
        found = self.outcomes(function, *arguments)
        errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(found) if text]
        assert not errors, "\n".join(errors)
        return [value for _, value in found]

    def outcomes(self, function, *arguments):
        """(text of the error or None, result) of each rank; of one that has ended, ("ended", None)."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = []
        for pipe in self.pipes:
            assert pipe.poll(300), "a rank does not answer"
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(("ended", None))
        return found

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


@functools.cache
def ranks(size):
    """The processes of a group of this size, the same ones for all tests."""
    found = Ranks(size)
    atexit.register(found.close)
    return found


def _serve(pipe, rank, size, meeting, timeout):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        torch.manual_seed(0)
        try:
            answer = (None, function(rank, size, *arguments))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
