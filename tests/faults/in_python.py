"""Faults of the Python files: checks, merges, searches, state."""

from __future__ import annotations

from . import Fault

STATE, TOPK, COARSE = (
    "tests/test_mining_state.py",
    "tests/test_similarity_topk.py",
    "tests/test_similarity_topk_coarse.py",
)
BANK, SAMPLING = "tests/test_mining_bank.py", "tests/test_mining_sampling.py"

FAULTS = [
    # ---- Searches of a corpus ----------------------------------------------------------------------------------------
    Fault(
        "a fingerprint that ignores dtype and shape",
        "contrastive_ops/mining/_fingerprint.py",
        '            digest.update(f"{thing.dtype} {tuple(thing.shape)} ".encode())\n',
        "",
        (STATE, "-k", "fingerprints"),
    ),
    Fault(
        "a corpus that is known by its first row alone",
        "contrastive_ops/mining/streaming.py",
        "    count = min(SAMPLED_ROWS, corpus.rows)\n",
        "    count = min(1, corpus.rows)\n",
        (STATE, "-k", "checkpoint_of_another"),
    ),
    Fault(
        "a floor of an earlier block that is a fixed step lower",
        "contrastive_ops/mining/state.py",
        "return last if later else last.nextafter(torch.full_like(last, -torch.inf))",
        "return last if later else last - 1e-6",
        (STATE, "-k", "ties_go"),
    ),
    Fault(
        "a floor of an earlier block that drops equal scores",
        "contrastive_ops/mining/state.py",
        "        later = base_index >= found.covered[-1][1]\n",
        "        later = base_index >= found.covered[0][1]\n",
        (STATE, "-k", "ties_go or any_partition"),
    ),
    Fault(
        "statistics of a block that are not added to those before",
        "contrastive_ops/mining/state.py",
        "statistics = {name: each + counted[name] for name, each in found.statistics.items()}",
        "statistics = {name: counted[name] for name, each in found.statistics.items()}",
        (STATE, "-k", "statistics"),
    ),
    Fault(
        "indices of a block that count from its first row",
        "contrastive_ops/mining/state.py",
        "torch.where(top.indices < 0, -1, top.indices + base_index)",
        "top.indices + base_index",
        (STATE, "-k", "excluded or any_partition"),
    ),
    Fault(
        "a checkpoint that is written over the one before",
        "contrastive_ops/mining/streaming.py",
        '        part = f"{self.path}.{os.getpid()}.part"\n',
        "        part = self.path\n",
        (STATE, "-k", "write_that_fails or survives"),
    ),
    Fault(
        "a range that is missing behind the last one",
        "contrastive_ops/mining/_ranges.py",
        "    if begin < end:\n        yield begin, end\n",
        "",
        (STATE, "-k", "interrupted or missing"),
    ),
    Fault(
        "lists of a block of columns with the first column of the next",
        "contrastive_ops/core/column_lists.py",
        "    kept = (indices >= begin) & (indices < end)\n",
        "    kept = (indices >= begin) & (indices <= end)\n",
        (STATE, "-k", "any_partition"),
    ),
    Fault(
        "a coarse certificate that ignores the rounding of float32 sums",
        "contrastive_ops/ops/coarse.py",
        "return (lost * norm + length * (error + sums * (norm + error))) * (1 + 1e-4)",
        "return (lost * norm + length * error) * (1 + 1e-4)",
        (COARSE, "-k", "certificate or sums"),
    ),
    Fault(
        "a coarse certificate that ignores biases",
        "contrastive_ops/ops/coarse.py",
        "    doubt_of_logits = size * doubt + _added(row_bias, col_bias, table)\n",
        "    doubt_of_logits = size * doubt\n",
        (COARSE, "-k", "certificate"),
    ),
    Fault(
        "bounds of a coarse pass that are relaxed in the wrong direction",
        "contrastive_ops/core/rule_kinds.py",
        "return {slot: data[slot] + self.sign * by(data[slot], cols) for slot, cols in self._sides(data)}",
        "return {slot: data[slot] - self.sign * by(data[slot], cols) for slot, cols in self._sides(data)}",
        (COARSE, "-k", "rules"),
    ),
    Fault(
        "what no token retrieved has the similarity of the first one that was",
        "contrastive_ops/ops/xtr.py",
        "        best = torch.where(retrieved, best, top.values[:, -1:])\n",
        "        best = torch.where(retrieved, best, top.values[:, :1])\n",
        ("tests/test_xtr.py", "-k", "paper"),
    ),
    Fault(
        "what is missing is 0 where fewer tokens than k were retrieved",
        "contrastive_ops/ops/xtr.py",
        "        best = torch.where(retrieved, best, top.values[:, -1:])\n",
        "        best = torch.where(retrieved, best, top.values[:, -1:].nan_to_num(neginf=0.0))\n",
        ("tests/test_xtr.py", "-k", "missing_where"),
    ),
    # ---- Sampling and memory -----------------------------------------------------------------------------------------
    Fault(
        "random numbers that do not depend on the seed",
        "contrastive_ops/mining/_sampling.py",
        "    key = mix(torch.full_like(query_ids, seed) + _STEP)\n",
        "    key = mix(torch.full_like(query_ids, 0) + _STEP)\n",
        (SAMPLING, "-k", "seeds or uniform"),
    ),
    Fault(
        "rows that are not finite move the pointer of a bank",
        "contrastive_ops/mining/bank.py",
        "        end = self.pointer + finite.sum()\n",
        "        end = self.pointer + len(finite)\n",
        (BANK, "-k", "finite"),
    ),
    Fault(
        "a bank that holds more entries than it has slots",
        "contrastive_ops/mining/bank.py",
        "(self.filled, (self.filled + finite.sum()).clamp_max(self.capacity)),",
        "(self.filled, self.filled + finite.sum()),",
        (BANK, "-k", "enqueue or end"),
    ),
    Fault(
        "entries of a bank that are one batch older than allowed",
        "contrastive_ops/mining/bank.py",
        'return ages <= checks.integer("MemoryBank", "max_age", max_age, 0)',
        'return ages <= 1 + checks.integer("MemoryBank", "max_age", max_age, 0)',
        (BANK, "-k", "topk or views"),
    ),
    Fault(
        "a running denominator that a batch which overflowed spoils",
        "contrastive_ops/losses/sog_clr.py",
        "stored = torch.where(log_mean.isfinite(), new, -torch.inf).to(self.log_u)",
        "stored = new.to(self.log_u)",
        ("tests/test_state.py", "-k", "finite"),
    ),
    # ---- Arithmetic --------------------------------------------------------------------------------------------------
    Fault(
        "a sum of more than 32,768 numbers that depends on the number of threads",
        "contrastive_ops/core/ordered.py",
        "[part.sum() for part in values.split(PART)]",
        "[values.sum()]",
        ("tests/test_sums.py", "-k", "threads"),
    ),
    Fault(
        "a logsumexp of nothing whose gradient is NaN",
        "contrastive_ops/core/numerics.py",
        "    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())\n\n\ndef lse_of_rows",
        "    return torch.where(empty, -torch.inf, top + total.log())\n\n\ndef lse_of_rows",
        ("tests/test_similarity_reduce.py", "-k", "merge_lse"),
    ),
    Fault(
        "a gradient along a row of unit length",
        "contrastive_ops/core/unit_rows.py",
        "return along, torch.addcmul(gradient, unit, along, value=-1)",
        "return along, gradient",
        ("tests/test_losses_16_bit.py", "-k", "unit_rows or not_rounded"),
    ),
    Fault(
        "hardness whose gradient is that of the harder logits",
        "contrastive_ops/losses/_hardness.py",
        "        return lse * share + (lse * (1 - share)).detach()\n",
        "        return lse\n",
        ("tests/test_losses_negatives.py", "-k", "hardness_of"),
    ),
    Fault(
        "a capacity that is rounded down",
        "contrastive_ops/ops/gating.py",
        "most = math.ceil(factor * k * size / experts - 1e-9)",
        "most = math.floor(factor * k * size / experts)",
        ("tests/test_expert_routing.py", "-k", "float_is_a_share"),
    ),
    Fault(
        "tokens that are not valid and count in the reference",
        "contrastive_ops/reference/expert_routing.py",
        "        live = live & valid\n",
        "        live = live | valid\n",
        ("tests/test_expert_routing.py", "-k", "reference and padding"),
    ),
    Fault(
        "tokens that are given no expert count where valid is given, too",
        "contrastive_ops/ops/gating.py",
        "            valid = some if valid is None else valid & some\n",
        "            valid = some if valid is None else valid\n",
        ("tests/test_expert_routing.py", "-k", "given_no_expert"),
    ),
    Fault(
        "equal scores of the reference that come in any order",
        "contrastive_ops/reference/similarity_topk.py",
        "chosen = larger | (ties & (ties.cumsum(1) <= kept - larger.sum(1, keepdim=True)))",
        "chosen = larger | (ties & (ties.cumsum(1) <= 1 + kept - larger.sum(1, keepdim=True)))",
        (TOPK, "-k", "reference and ties"),
    ),
]
