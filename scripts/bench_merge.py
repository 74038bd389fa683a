"""What a merge costs, ours against PEFT and mergekit in one run: CPU seconds and memory, files included.

    python scripts/bench_merge.py                 # 512 wide, 8 layers, 4 adapters of rank 16 (about 2 minutes)
    python scripts/bench_merge.py --seven-b       # 7B shapes, 8 adapters (about 3 minutes; 3 GB of scratch files)
    python scripts/bench_merge.py --smoke         # tiny shapes: does it run? (the bars mean nothing there)

Every case is its own process. CPU seconds: user + system of that process and its children, all threads, around the
merge only (imports and the building of PEFT's base model are not counted); the least of some runs, peers and ours in
turns, so that a loaded machine changes both. One thread each, since LAPACK's threads spin for nothing on shared cores,
which would count against the peers. Memory: peak resident size beyond what stood before. PEFT's full SVDs of 7B shapes
are measured on one matrix of each shape and multiplied up, since all would take hours; a wide matrix counts as its
transpose. mergekit makes no adapter: `mergekit ties` is its functions on the dense deltas, which stops there, and
`mergekit ties + extract` goes on to rank 16 by full SVDs as its extract_lora does, to the same product as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RANK = 16


def shapes(hidden: int, wide: int, layers: int) -> dict[str, tuple[int, int]]:
    """Llama's linear modules: name -> (out, in)."""
    square = [f"self_attn.{x}_proj" for x in "qkvo"]
    made = {}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        made |= {stem + name: (hidden, hidden) for name in square}
        made |= {stem + "mlp.gate_proj": (wide, hidden), stem + "mlp.up_proj": (wide, hidden)}
        made[stem + "mlp.down_proj"] = (hidden, wide)
    return made


def write_adapters(root: Path, modules: dict[str, tuple[int, int]], count: int) -> list[Path]:
    """Random adapters, Gaussian factors * 0.02, float32."""
    from safetensors.numpy import save_file

    paths = []
    for k in range(count):
        rng = np.random.default_rng(k)
        tensors = {}
        for name, (m, n) in modules.items():
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = 0.02 * rng.standard_normal((RANK, n), np.float32)
            tensors[f"{stem}.lora_B.weight"] = 0.02 * rng.standard_normal((m, RANK), np.float32)
        folder = root / f"expert{k}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        names = sorted({name.rsplit(".", 1)[1] for name in modules})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "random",
            "target_modules": names,
        }
        (folder / "adapter_config.json").write_text(json.dumps({**config, "r": RANK, "lora_alpha": RANK}))
        paths.append(folder)
    return paths


class Meter:
    """CPU seconds and peak memory of a block."""

    def __enter__(self) -> Meter:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: here, not with the imports
        self._start_kb = self._kilobytes("VmRSS")
        self._cpu, self._wall = self._seconds(), time.perf_counter()
        return self

    @staticmethod
    def _kilobytes(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1])

    @staticmethod
    def _seconds() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = self._seconds() - self._cpu, time.perf_counter() - self._wall
        peak_kb = self._kilobytes("VmHWM")  # ru_maxrss would count what the parent held before the exec
        self.result = {"cpu_s": self.cpu, "wall_s": self.wall, "memory_mb": max(0, peak_kb - self._start_kb) / 1024}


def run_ours(job: dict, out: Path) -> dict:
    from mtft.merge.engine.merge import merge_adapters

    options = {"density": 0.2} if job["method"] == "ties" else None
    with Meter() as meter:
        report = merge_adapters(
            job["adapters"], out, job["method"], options, rank=RANK, min_energy=0, precision=job["precision"]
        )
    return meter.result | {"energy": report.energy}


def run_peft(job: dict, out: Path) -> dict:
    import warnings

    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    heads = max(1, job["hidden"] // 64)
    sizes = {"hidden_size": job["hidden"], "intermediate_size": job["wide"], "num_hidden_layers": job["layers"]}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, vocab_size=64))
    extra = {"density": 0.2} if "ties" in job["method"] else {}
    with Meter() as meter:
        model = PeftModel.from_pretrained(base, job["adapters"][0], adapter_name="0")
        for k, path in enumerate(job["adapters"][1:], 1):
            model.load_adapter(path, str(k))
        names = [str(k) for k in range(len(job["adapters"]))]
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", job["method"], svd_rank=RANK, **extra)
        model.save_pretrained(out, selected_adapters=["merged"])
    return meter.result


def run_mergekit(job: dict, out: Path) -> dict:
    """mergekit's TIES functions on full weights in memory (its files would be full models), written once."""
    import torch
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import magnitude
    from safetensors.torch import load_file, save_file

    with Meter() as meter:
        adapters = [load_file(Path(path) / "adapter_model.safetensors") for path in job["adapters"]]
        merged = {}
        for key in [key for key in adapters[0] if key.endswith("lora_A.weight")]:
            pair = key.replace("lora_A", "lora_B")
            base = torch.zeros(adapters[0][pair].shape[0], adapters[0][key].shape[1])
            models = [base + a[pair] @ a[key] for a in adapters]
            deltas = torch.stack([magnitude(x - base, 0.2) for x in models])
            mask = get_mask(deltas, method="sum", mask_dtype=base.dtype)
            count = mask.sum(dim=0)
            count[count == 0] = 1
            delta = (deltas * mask).sum(dim=0) / count
            if job["extract"]:
                U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
                merged[key] = Vh[:RANK].contiguous()
                merged[pair] = (U[:, :RANK] * S[:RANK]).contiguous()
            else:
                merged[key.replace(".lora_A", "")] = base + delta
        out.mkdir()
        save_file(merged, out / "model.safetensors")
    return meter.result


def run_full_svd(job: dict, out: Path) -> dict:
    """PEFT's svd of one matrix of each shape: sum of the deltas, then a full SVD."""
    import torch

    total = 0.0
    for (m, n), count in ((tuple(shape), count) for shape, count in job["shapes"]):
        delta = torch.randn(m, RANK * job["count"]) @ torch.randn(RANK * job["count"], n)
        with Meter() as meter:
            torch.linalg.svd(delta, full_matrices=True)
        total += meter.cpu * count
    return {"cpu_s": total, "wall_s": None, "memory_mb": None}


RUNNERS = {"ours": run_ours, "peft": run_peft, "mergekit": run_mergekit, "full_svd": run_full_svd}


def measure(who: str, job: dict, scratch: Path) -> dict:
    """One case in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, __file__, "--child", who, json.dumps(job), str(Path(folder) / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=env)
    if done.returncode:
        sys.exit(f"{who} {job['method']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(cases: dict[str, tuple[str, dict]], scratch: Path, repeats: int) -> dict[str, dict]:
    """All cases, `repeats` times over; of each the run with the least CPU, and the least memory of any."""
    found: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (who, job) in cases.items():
            found[name].append(measure(who, job, scratch))
    best = {}
    for name, runs in found.items():
        best[name] = min(runs, key=lambda run: run["cpu_s"])
        if best[name]["memory_mb"] is not None:
            best[name]["memory_mb"] = min(run["memory_mb"] for run in runs)
        show(name, best[name])
    return best


def show(name: str, row: dict) -> None:
    memory = "" if row["memory_mb"] is None else f"{row['memory_mb']:9.0f} MB"
    energy = f"   energy {row['energy']:.3f}" if "energy" in row else ""
    print(f"{name:36s} {row['cpu_s']:10.2f} CPU s {memory}{energy}", flush=True)


def judge(what: str, value: float, bar: float, unit: str, *, least: bool) -> bool:
    """Print a figure beside its bar. least: the bar is a lower bound."""
    good = value >= bar if least else value < bar
    print(f"{'PASS' if good else 'MISS'}  {what:58s} {value:10.1f} {unit:8s} (bar: {'>=' if least else '<'} {bar:g})")
    return good


def small(hidden: int, wide: int, layers: int, repeats: int) -> dict:
    """The comparison at a size where PEFT still runs."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        adapters = [str(path) for path in write_adapters(scratch / "in", shapes(hidden, wide, layers), 4)]
        job = {"adapters": adapters, "hidden": hidden, "wide": wide, "layers": layers, "precision": "auto"}
        cases = {
            "mtft svd": ("ours", {**job, "method": "svd"}),
            "mtft tsv": ("ours", {**job, "method": "tsv"}),
            "mtft ties": ("ours", {**job, "method": "ties"}),
            "PEFT svd": ("peft", {**job, "method": "svd"}),
            "PEFT ties_svd": ("peft", {**job, "method": "ties_svd"}),
            "mergekit ties + extract": ("mergekit", {**job, "method": "ties", "extract": True}),
            "mergekit ties": ("mergekit", {**job, "method": "ties", "extract": False}),
        }
        found = in_turns(cases, scratch, repeats)

    def less(ours: str, peer: str, what: str = "cpu_s") -> float:
        return found[peer][what] / max(found[ours][what], 1e-3)

    print()
    judge("svd: less CPU than PEFT svd", less("mtft svd", "PEFT svd"), 15, "x", least=True)
    judge("tsv: less CPU than PEFT svd", less("mtft tsv", "PEFT svd"), 10, "x", least=True)
    for peer in ("PEFT ties_svd", "mergekit ties + extract", "mergekit ties"):
        judge(f"ties: less CPU than {peer}", less("mtft ties", peer), 2, "x", least=True)
        judge(f"ties: less memory than {peer}", less("mtft ties", peer, "memory_mb"), 5, "x", least=True)
    return found


def seven_b(hidden: int, wide: int, layers: int) -> dict:
    """7B shapes, 8 adapters, float32."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        adapters = [str(path) for path in write_adapters(scratch / "in", shapes(hidden, wide, layers), 8)]
        per_shape = [[(hidden, hidden), 4 * layers], [(wide, hidden), 3 * layers]]
        job = {"adapters": adapters, "precision": "fp32"}
        cases = {f"mtft {method}, whole model": ("ours", {**job, "method": method}) for method in ("svd", "tsv")}
        one = [str(path) for path in write_adapters(scratch / "one", {"layers.0.q": (hidden, hidden)}, 8)]
        found = in_turns(cases, scratch, 2)
        streamed = measure("ours", {**job, "adapters": one, "method": "ties"}, scratch)
        show(f"mtft ties, one module {hidden} x {hidden}", streamed)
        peer = measure("full_svd", {"method": "svd", "shapes": per_shape, "count": 8}, scratch)
        show("PEFT's full SVDs, extrapolated", peer)
    factors = 8 * RANK * (wide + hidden) * 4 / 2**20  # of the largest module, all adapters, float32
    print()
    for name, row in found.items():
        judge(f"{name}: less CPU than PEFT's SVDs", peer["cpu_s"] / row["cpu_s"], 1000, "x", least=True)
        judge(f"{name}: CPU seconds", row["cpu_s"], 20, "s", least=False)
        judge(f"{name}: beyond the factors of one module", row["memory_mb"] - factors, 100, "MB", least=False)
    factors = 8 * RANK * 2 * hidden * 4 / 2**20
    judge("mtft ties: beyond the factors of one module", streamed["memory_mb"] - factors, 100, "MB", least=False)
    return {**found, "ties, one module": streamed, "PEFT svd, extrapolated": peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--seven-b", action="store_true", help="7B shapes instead")
    parser.add_argument("--repeats", type=int, default=2, help="runs of every case; the least CPU counts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, job, out = args.child
        print(json.dumps(RUNNERS[who](json.loads(job), Path(out))))
        return
    if args.seven_b:
        found = seven_b(*((64, 128, 2) if args.smoke else (4096, 11008, 32)))
    else:
        found = small(*((64, 160, 2) if args.smoke else (512, 1344, 8)), 1 if args.smoke else args.repeats)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
