"""An interpreter of the few PTX instructions that sdrt's kernels use: what the committed file computes, without a GPU.

All threads go through the code side by side as numpy arrays. PTX ISA, chapter 9, says what each instruction does.
"""

import re

import numpy as np

BITS = {"u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32, "u64": np.uint64, "b64": np.uint64}


def run_kernel(ptx, name, parameters, *, blocks, threads):
    """parameters: numpy scalars by position; an array stands for its address and is written to."""
    return _Machine(ptx, name, parameters, blocks, threads).run()


class _Machine:
    def __init__(self, ptx, name, parameters, blocks, threads):
        body = ptx[ptx.index(f".entry {name}(") :]
        code = body[body.index("{") + 1 : body.rindex("}")]
        lines = [line.strip() for line in re.sub(r"//.*", "", code).replace(";", ";\n").splitlines()]
        self.lines = [line for line in lines if line and not line.startswith(".reg")]
        self.count = blocks * threads
        index = np.arange(self.count, dtype=np.uint32)
        self.registers = {
            "%tid.x": index % np.uint32(threads),
            "%ctaid.x": index // np.uint32(threads),
            "%ntid.x": np.full(self.count, threads, np.uint32),
        }
        self.memory = next(value for value in parameters if isinstance(value, np.ndarray))
        self.parameters = {
            f"{name}_param_{position}": np.uint64(0) if value is self.memory else value
            for position, value in enumerate(parameters)
        }
        self.active = np.ones(self.count, bool)
        self.waiting = {}  # label → threads that jumped there

    def run(self):
        with np.errstate(all="ignore"):
            for line in self.lines:
                self._line(line)
        return self.memory

    def _line(self, line):
        if label := re.fullmatch(r"(\$\w+):", line):
            self.active |= self.waiting.pop(label[1], np.zeros(self.count, bool))
            return
        match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.]+)\s*(.*);", line)
        negated, predicate, operation, rest = match.groups()
        operands = [part.strip() for part in rest.split(",")] if rest else []
        chosen = self.active
        if predicate is not None:
            chosen = chosen & (self.registers[predicate] ^ bool(negated))
        if operation == "bra":
            self.waiting[operands[0]] = self.waiting.get(operands[0], np.zeros(self.count, bool)) | chosen
            self.active = self.active & ~chosen
            return
        if operation == "ret":
            return
        getattr(self, "_" + operation.split(".")[0])(operation, operands, chosen)

    def _value(self, text, kind):
        dtype = BITS[kind]
        if text.startswith("%"):
            value = self.registers[text]
            return value if value.dtype == dtype else value.view(dtype)
        if text.startswith("0f"):
            return np.full(self.count, int(text[2:], 16), np.uint32).view(np.float32)
        return np.full(self.count, int(text) & 0xFFFFFFFF, np.uint32).view(dtype)

    def _set(self, target, value, chosen):
        old = self.registers.get(target)
        fresh = np.ascontiguousarray(value)
        if old is None:
            self.registers[target] = fresh.copy()
        else:
            self.registers[target] = np.where(chosen, fresh, old.view(fresh.dtype))

    def _ld(self, operation, operands, chosen):
        kind = operation.split(".")[-1]
        value = self.parameters[operands[1].strip("[]")]
        self._set(operands[0], np.full(self.count, value, BITS[kind]), chosen)

    def _st(self, operation, operands, chosen):
        addresses = self._value(operands[0].strip("[]"), "u64")[chosen]
        self.memory[addresses // 4] = self._value(operands[1], "f32")[chosen]

    def _mov(self, operation, operands, chosen):
        kind = operation.split(".")[-1]
        self._set(operands[0], self._value(operands[1], kind), chosen)

    def _cvta(self, operation, operands, chosen):
        self._set(operands[0], self._value(operands[1], "u64"), chosen)

    def _mul(self, operation, operands, chosen):
        kind = operation.split(".")[-1]
        if ".wide" in operation:
            left = self._value(operands[1], "u32").astype(np.uint64)
            self._set(operands[0], left * np.uint64(int(operands[2])), chosen)
            return
        left, right = self._value(operands[1], kind), self._value(operands[2], kind)
        if ".hi" in operation:
            product = left.astype(np.uint64) * right.astype(np.uint64)
            self._set(operands[0], (product >> np.uint64(32)).astype(np.uint32), chosen)
        else:
            self._set(operands[0], left * right, chosen)

    def _mad(self, operation, operands, chosen):
        first, second, third = (self._value(text, "u32") for text in operands[1:])
        self._set(operands[0], first * second + third, chosen)

    def _add(self, operation, operands, chosen):
        kind = {"s32": "u32", "s64": "u64"}.get(operation.split(".")[-1], operation.split(".")[-1])
        self._set(operands[0], self._value(operands[1], kind) + self._value(operands[2], kind), chosen)

    def _sub(self, operation, operands, chosen):
        self._set(operands[0], self._value(operands[1], "u32") - self._value(operands[2], "u32"), chosen)

    def _xor(self, operation, operands, chosen):
        self._set(operands[0], self._value(operands[1], "u32") ^ self._value(operands[2], "u32"), chosen)

    def _and(self, operation, operands, chosen):
        self._set(operands[0], self._value(operands[1], "u32") & self._value(operands[2], "u32"), chosen)

    def _setp(self, operation, operands, chosen):
        _, comparison, kind = operation.split(".")
        left, right = self._value(operands[1], kind), self._value(operands[2], kind)
        compare = {"ge": np.greater_equal, "lt": np.less, "eq": np.equal}[comparison]
        self._set(operands[0], compare(left, right), chosen)

    def _selp(self, operation, operands, chosen):
        left, right = self._value(operands[1], "f32"), self._value(operands[2], "f32")
        self._set(operands[0], np.where(self.registers[operands[3]], left, right), chosen)

    def _cvt(self, operation, operands, chosen):
        self._set(operands[0], self._value(operands[1], operation.split(".")[-1]).astype(np.float32), chosen)

    def _fma(self, operation, operands, chosen):
        first, second, third = (self._value(text, "f32").astype(np.float64) for text in operands[1:])
        self._set(operands[0], (first * second + third).astype(np.float32), chosen)

    def _sqrt(self, operation, operands, chosen):
        self._set(operands[0], np.sqrt(self._value(operands[1], "f32")), chosen)

    def _sin(self, operation, operands, chosen):
        exact = np.sin(self._value(operands[1], "f32").astype(np.float64))
        self._set(operands[0], exact.astype(np.float32), chosen)
