"""The installed package outside the tree: ``python smoke.py FOLDER`` checks that it came from there."""

import sys
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

import tvm_balanced as tb
from tvm_balanced.cuda import emulator as cudaemu


def main(folder: str) -> None:
    """Compile and run one layer, and run one CUDA kernel emulated."""
    assert Path(tb.__file__).is_relative_to(Path(folder).resolve()), tb.__file__
    rng = np.random.default_rng(0)
    x = relax.Var("x", relax.TensorType((2, 64), "float32"))
    w = relax.Var("w", relax.TensorType((64, 48), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, w], attrs={"num_input": 1}):
        with bb.dataflow():
            out = bb.emit_output(relax.op.matmul(x, w))
        bb.emit_func_output(out)
    weight = rng.standard_normal((64, 48)).astype("float32")
    model = tb.prune(tb.from_relax(bb.get(), {"w": weight}), "4:16")
    data = rng.standard_normal((2, 64)).astype("float32")
    got = tb.compile(model, "llvm", policy="always")(data)
    np.testing.assert_allclose(got, data @ model.params["w"], rtol=1e-4, atol=1e-4)
    kernel = cudaemu.Module(
        'extern "C" __global__ void add(float* a) { a[threadIdx.x] += blockIdx.x; }'
    )
    values = np.zeros(4, "float32")
    kernel.launch(cudaemu.Launch("add", grid=[3], block=[4], args=[values]))
    assert (values == 3).all(), values
    print(f"tvm-balanced {tb.__version__} on TVM {tvm.__version__}: ok")


if __name__ == "__main__":
    main(sys.argv[1])
