"""The stage that decides whether it pays: SD1.5's size at 512x512 against PyTorch in FP16 on the same GPU."""

from dataclasses import replace
from pathlib import Path

from sdrt.benchmarks import contestants
from sdrt.benchmarks.cases import Case
from sdrt.benchmarks.contestants import SDRT, Contestant, ContestantSpec
from sdrt.benchmarks.gpu.results import Bound, Findings
from sdrt.benchmarks.machine import describe_machine
from sdrt.benchmarks.report import Report, bars_of, parity_verdict, write_report
from sdrt.benchmarks.run import Record, compare, summarise
from sdrt.benchmarks.suites import sd15
from sdrt.bundle import Bundle, JsonValue
from sdrt.errors import BackendError
from sdrt.progress import silent
from sdrt.runners.nvidia import require_device

STEPS = 30
ROUNDS = 10
WARMUP = 3
EAGER, COMPILED = "PyTorch eager fp16 CUDA", "PyTorch compile fp16 CUDA"
GAP_SHARE = 0.01  # of the time of the steps
BARS = {
    "step, times PyTorch eager fp16": ("step", EAGER, 2.0),
    "image, times diffusers eager fp16": ("total", EAGER, 2.0),
    "step, times torch.compile": ("step", COMPILED, 1.1),
    "image, times diffusers with torch.compile": ("total", COMPILED, 1.1),
}


def check_latency(bundle: Path, checkpoint: Path, out: Path, *, threads: int | None) -> Findings:
    """Compare, and write the report to `out`. Raises BackendError when a contestant dies, or there is no GPU.

    A step of PyTorch is the network alone by the GPU's clock; ours holds guidance and the sampler as well.
    """
    require_device()
    specs = [
        contestants.compiled(bundle, threads=threads, watch_gpu=True),
        contestants.pytorch(checkpoint, "fp16", threads=threads, cuda=True),
        contestants.pytorch(checkpoint, "fp16", threads=threads, cuda=True, compile_unet=True),
    ]
    cases = [replace(case, num_inference_steps=STEPS) for case in sd15.cases()]
    memory = {spec.name: memory_alone(spec, cases[0]) for spec in specs[:2]}
    machine = describe_machine()
    records = compare(specs, cases, rounds=ROUNDS, warmup=WARMUP, say=silent)
    rows = summarise(records, ours=SDRT, reference=EAGER)
    bars = bars_of(BARS, rows)
    opened = Bundle.open(bundle).manifest
    report = Report(
        title="SD1.5 architecture, random weights, on a GPU: sdrt and PyTorch",
        command="make gpu-check",
        machine=machine,
        bundle={
            "model": opened.model.name,
            "identity": opened.model.identity,
            "backend": f"{opened.backend.name} {opened.backend.version}",
            "precision": opened.precision,
        },
        settings={"rounds": ROUNDS, "warm-up rounds": WARMUP, "cold starts": 1, "in memory at a time": "all"},
        cases=cases,
        rows=rows,
        records=records,
        reference=EAGER,
        bars=bars,
        extra={},
        parity=parity_verdict(rows, opened.precision),
    )
    write_report(report, out, overwrite=True)
    by_name = {record.name: record for record in records}
    figures: dict[str, JsonValue] = {f"{name}: GPU memory GB": round(size / 1e9, 2) for name, size in memory.items()}
    figures |= {f"{row.name}: step ms": round(row.step.median * 1e3, 3) for row in rows}
    figures |= {f"{row.name}: image ms": round(row.total.median * 1e3, 1) for row in rows}
    figures |= {f"{row.name}: PSNR to the reference dB": row.parity.psnr_db for row in rows if row.parity is not None}
    return Findings(
        bounds=[
            *(Bound(name=bar.name, measured=bar.measured, bound=bar.bound) for bar in bars),
            Bound(
                name="gaps between steps, share of their time",
                measured=gap_share(by_name[SDRT]),
                bound=GAP_SHARE,
                kind="at most",
            ),
            Bound(
                name="GPU memory, times PyTorch eager's",
                measured=memory[SDRT] / memory[EAGER],
                bound=1,
                kind="at most",
            ),
        ],
        figures=figures,
    )


def memory_alone(spec: ContestantSpec, case: Case) -> int:
    """Bytes of the GPU that a contestant holds after a picture, with nobody beside it: what is read is the whole GPU's.

    Raises BackendError when it dies, or nobody watched.
    """
    with Contestant(spec) as contestant:
        seen = contestant.draw(case.arguments()).gpu_bytes
    if seen is None:
        raise BackendError(f"nobody watched the GPU's memory of {spec.name}", hint="this is a fault of the runbook")
    return seen


def gap_share(record: Record) -> float | None:
    """The worst round's gaps, of the time of its steps; None where the runtime measures none."""
    shares = [
        drawing.gap_seconds / sum(drawing.step_seconds) for drawing in record.rounds if drawing.gap_seconds is not None
    ]
    return max(shares) if shares else None
