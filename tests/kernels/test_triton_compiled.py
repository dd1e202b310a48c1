"""What the compiler makes of the kernels for a Hopper GPU, read as text: no GPU is needed for that.

Bits depend on two things that an interpreter cannot show: that no product is fused with its sum, and that subnormal numbers
are kept.
"""

import re

import pytest
import torch
from tests.support.triton import kernels

triton = pytest.importorskip("triton")

RUN = {"table": "*i64", "terms": "i32", "book": "*i8", "site": "i64", "start": "i64", "count": "i64"}
FLAGS = {"BOOK": 0, "ALIGNED": True, "TILE": 8192, "terms": 1}
UPDATE = ("update_run", {"stored": "*i16", "carried": "*i16", **RUN}, FLAGS | {"KIND": 1})
PERTURB = (
    "perturb_run",
    {"stored": "*i16", "carried": "*i16", "plus": "*i16", "minus": "*i16", **RUN},
    FLAGS | {"KIND": 1, "CARRIED": False, "PLUS": True, "MINUS": True},
)
FP32 = ("update_run", {"stored": "*fp32", "carried": "*fp32", **RUN}, FLAGS | {"KIND": 0})
POOL = (
    "update_run",
    {"stored": "*i16", "carried": "*i16", **RUN},
    {k: v for k, v in (FLAGS | {"KIND": 1, "BOOK": 2}).items() if k != "terms"},
)


CHOSEN = {"rows": "*i64", "table": "*i64", "terms": "i32", "book": "*i8", "site": "i64", "width": "i64", "count": "i64"}
MANY = {"owner": "*i32", "place": "*i64", "table": "*i64", "terms": "i32", "book": "*i8"}
STORED = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*i16", torch.float16: "*fp16"}


@pytest.fixture(scope="module")
def ptx():
    """The assembly of a kernel: (name, types of arguments, constants) -> text."""
    loaded = kernels("cuda")
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def compiled(case):
        name, types, constants = case
        kernel, constants = getattr(loaded.jit, name), {"FLOAT": loaded.jit.FP32} | constants
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if signature[n].startswith("*")}
        source = triton.compiler.ASTSource(
            kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned
        )
        options = {
            "num_warps": loaded.noise.OPTIONS["num_warps"],
            "enable_fp_fusion": loaded.noise.OPTIONS["enable_fp_fusion"],
        }
        return triton.compile(source, target=target, options=options).asm["ptx"]

    return compiled


@pytest.mark.parametrize("case", [UPDATE, PERTURB, FP32, POOL], ids=["update", "perturb", "fp32", "pool"])
def test_every_product_and_sum_is_rounded_on_its_own(ptx, case):
    text = ptx(case)
    assert not re.search(r"\bfma\.", text)
    assert ".ftz" not in text
    assert re.search(r"\bmul\.rn\.f32\b", text)  # .rn: the assembler may not fuse it either
    assert re.search(r"\b(add|sub)\.rn\.f32\b", text)
    assert not re.search(r"\b(mul|add|sub)\.f32\b", text)


@pytest.mark.parametrize("case", [UPDATE, PERTURB, FP32], ids=["update", "perturb", "fp32"])
def test_sixteen_bytes_are_moved_at_once(ptx, case):
    """Whole tensors are read and written with 16-byte accesses; anything less is far from memory speed."""
    text = ptx(case)
    assert not re.search(r"\b(ld|st)\.global\.(b16|b32|u16)\b", text)
    assert re.search(r"\bst\.global\.v4\.b32\b", text)
    assert ".local" not in text  # no registers are spilled to memory


def test_bf16_is_rounded_by_the_hardware(ptx):
    """To nearest, halves to even; the interpreter's detour is not compiled."""
    assert "cvt.rn.bf16x2.f32" in ptx(PERTURB)


def _cases(kind, precision, stored):
    """Every kernel on tensors of one dtype, with terms of both books (which compiles what one book needs as well)."""
    memory, both = {"stored": stored, "carried": stored if kind == 0 else "*i16"}, {"plus": stored, "minus": stored}
    shared = {"BOOK": 2, "KIND": kind, "FLOAT": precision}
    sides, whole = {"CARRIED": kind != 0, "PLUS": True, "MINUS": True}, {"ALIGNED": False, "TILE": 8192}
    return [
        ("update_run", memory | RUN, shared | whole),
        ("perturb_run", memory | both | RUN, shared | sides | whole),
        ("update_rows", memory | CHOSEN, shared | {"ELEMENTS": 1024}),
        ("perturb_rows", memory | both | CHOSEN, shared | sides | {"ELEMENTS": 1024}),
        ("update_many", MANY, shared | {"TILE": 8192}),
    ]


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_every_kernel_compiles(ptx, dtype):
    """On the oldest Triton too, which wants things put otherwise. In fp64 a sum is rounded on its own as well."""
    kind, _, precision = kernels("cuda").noise.KINDS[dtype]
    for case in _cases(kind, precision, STORED[dtype]):
        text = ptx(case)
        assert not re.search(r"\bfma\.", text), case
        assert ".ftz" not in text, case
