"""What the Triton kernels become, without a GPU: `python benchmarks/compiled_kernels.py`.

Every launch of every case in kernel_cases/ is compiled ahead of time for each architecture, and its machine
code is read: registers, spills, shared memory, the widths of its global accesses, fp64 instructions,
instructions per element. Writes compiled-kernels.json and compiled-kernels.md to --out; with --few, a
representative few, compiled-kernels-few.json, with which the suite compares what it compiles itself.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_cases import Case, cases  # noqa: E402

from ict_kernels.triton_support import Launch  # noqa: E402

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*u1",
}


@dataclass(frozen=True)
class MachineCode:
    """One kernel on one architecture.

    Attributes:
        stack_bytes: local memory per thread: anything but 0 is a spill, or an array that is indexed.
        loads, stores: global accesses by width in bits.
        fp64: fp64 arithmetic instructions.
        fused_sums: products fused with what another lane adds to them, so that lanes end with other sums.
        instructions_per_element: static instructions, times threads, over the elements that they handle.
    """

    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    fp64: int
    fused_sums: int
    instructions: int
    instructions_per_element: float | None


def compile_launch(launch: Launch, architecture: int, scalar: str = "fp32") -> MachineCode:
    """Compiles what a launch would compile, and reads the machine code.

    Args:
        launch: a recorded one; tensors may be on the meta device and count as aligned to 16 bytes.
        architecture: 80, 90 or 100.
        scalar: the type of Python floats: "fp32" (Triton's own launcher) or "fp64" (Inductor's).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch, scalar)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.num_warps, "maxnreg": launch.maxnreg, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = _output(tool, "--dump-resource-usage", cubin.name)
        sass = _output(tool, "--dump-sass", cubin.name)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
    threads = 32 * launch.num_warps
    return MachineCode(
        architecture=architecture,
        registers=_field(usage, "REG"),
        stack_bytes=_field(usage, "STACK") + _field(usage, "LOCAL"),
        shared_bytes=compiled.metadata.shared,
        loads=_widths(opcodes, "LDG"),
        stores=_widths(opcodes, "STG"),
        fp64=sum(opcode.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for opcode in opcodes),
        fused_sums=fused_sums(sass),
        instructions=len(opcodes),
        instructions_per_element=round(len(opcodes) * threads / launch.elements, 2)
        if launch.elements
        else None,
    )


def fused_sums(sass: str) -> int:
    """How often a product is added, unrounded, to that of another lane: FMUL, SHFL of it, FFMA."""
    products: dict[str, frozenset[str]] = {}
    shuffled: dict[str, frozenset[str]] = {}
    found = 0
    for opcode, operands in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*) ([^;]*);", sass):
        names = [each.strip().removesuffix(".reuse").lstrip("-") for each in operands.split(",")]
        if opcode == "FFMA" and shuffled.get(names[3]) == {*names[1:3]}:
            found += 1
        target = names[1] if opcode.startswith("SHFL") else names[0]
        product = products.get(names[2]) if opcode.startswith("SHFL.BFLY") else None
        for register, known in ((products, None), (shuffled, product)):
            register.pop(target, None)
            if known is not None:
                register[target] = known
        if opcode == "FMUL":
            products[target] = frozenset(names[1:3])
    return found


def specialised(
    launch: Launch, scalar: str
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """What Triton's launcher makes of the arguments: types by name, constants and attributes by place.

    tests/kernels/test_launches.py compares it with the launcher.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        constant = parameter.is_constexpr or value is None or one
        kind = "constexpr" if constant else parameter.annotation_type or _type(value, scalar)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any, scalar: str) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), value
    return scalar


def _widths(opcodes: list[str], prefix: str) -> dict[int, int]:
    """Global accesses by width in bits: LDG.E.128 -> 128, LDG.E.U16 -> 16, LDG.E -> 32."""
    widths: Counter[int] = Counter()
    for opcode in opcodes:
        parts = opcode.split(".")
        if parts[0] == prefix:
            numbers = [int(part.lstrip("US")) for part in parts[1:] if part.lstrip("US").isdigit()]
            widths[numbers[0] if numbers else 32] += 1
    return dict(sorted(widths.items()))


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------- the table

_COLUMNS = (
    "op",
    "shape",
    "algorithm",
    "kernel",
    "sm",
    "registers",
    "stack B",
    "shared B",
    "loads",
    "stores",
    "fp64",
    "fused sums",
    "instr/elt",
    "B/elt (min)",
)


def measure(case: Case, architectures: Sequence[int], scalars: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record for each launch of a case, architecture and type of the scalars."""
    for launch in case.launches:
        floats = any(isinstance(value, float) for value in launch.arguments.values())
        for architecture in architectures:
            for scalar in scalars if floats else scalars[:1]:
                code = compile_launch(launch, architecture, scalar)
                yield {
                    "op": case.op,
                    "shape": case.shape,
                    "algorithm": case.algorithm,
                    "kernel": launch.kernel.__name__,
                    "num_warps": launch.num_warps,
                    "scalars": scalar,
                    **asdict(code),
                    "bytes_per_element": case.bytes_per_element,
                    "minimum_bytes_per_element": case.minimum_bytes_per_element,
                }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records with fp32 scalars as a Markdown table."""

    def widths(found: dict[Any, int]) -> str:
        return " ".join(f"{count}x{width}" for width, count in sorted(found.items(), reverse=True)) or "-"

    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for record in records:
        if record["scalars"] != "fp32":
            continue
        each = record["instructions_per_element"]
        rows.append(
            (
                record["op"],
                record["shape"],
                record["algorithm"],
                record["kernel"],
                str(record["architecture"]),
                str(record["registers"]),
                str(record["stack_bytes"]),
                str(record["shared_bytes"]),
                widths(record["loads"]),
                widths(record["stores"]),
                str(record["fp64"]),
                str(record["fused_sums"]),
                "-" if each is None else f"{each:.1f}",
                f"{record['bytes_per_element']:g} ({record['minimum_bytes_per_element']:g})",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--few", action="store_true", help="a representative few cases")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--scalars", nargs="+", default=("fp32", "fp64"), choices=("fp32", "fp64"))
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    options = parser.parse_args()
    chosen = [case for case in cases(full=not options.few) if options.op in case.op]
    records, started = [], time.monotonic()
    for number, case in enumerate(chosen, start=1):
        records.extend(measure(case, options.sm, options.scalars))
        remaining = (time.monotonic() - started) / number * (len(chosen) - number)
        print(f"{number}/{len(chosen)} {case.op}, {case.shape}; {remaining:.0f} s left", file=sys.stderr)
    print(table(records), end="")
    versions = {"torch": torch.__version__, "triton": metadata.version("triton")}
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"versions": versions, "kernels": records}
    # Of the few it is the file that the suite compares with; the table of all stays what it was.
    name = "compiled-kernels-few" if options.few else "compiled-kernels"
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    chosen_words = [
        *(["--few"] if options.few else []),
        *(["--sm", *map(str, options.sm)] if tuple(options.sm) != tuple(ARCHITECTURES) else []),
        *(["--scalars", *options.scalars] if tuple(options.scalars) != ("fp32", "fp64") else []),
        *(["--op", repr(options.op)] if options.op else []),
    ]
    command = " ".join(["python benchmarks/compiled_kernels.py", *chosen_words])
    (options.out / f"{name}.md").write_text(
        f"The kernels' machine code, compiled ahead of time by Triton {versions['triton']}, by `{command}`.\n"
        "Nothing was run. Accesses are instructions x bits; B/elt is what the algorithm moves and, in"
        f" brackets, the minimum.\n\n{table(records)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
