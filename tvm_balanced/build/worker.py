"""Build one CUDA library in a process of its own: ``python -m tvm_balanced.build.worker JOB``.

TVM decides at import whether its CUDA runtime is there, and only with it does an exported library
hold machine code. Where the machine has no driver, a stand-in is loaded before TVM, which must
never happen in a process that may later use a GPU. :mod:`tvm_balanced.build.export` writes the job
folder and reads the result.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main(directory: str) -> int:
    """Build the job in ``directory``; the outcome is left in its ``result.json``."""
    folder = Path(directory)
    try:
        result = _run(folder, json.loads((folder / "job.json").read_text()))
    except Exception as error:
        result = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def _run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    # the loader goes by SONAME: what is loaded here is what TVM's library then finds
    for library in job["preload"]:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    import tvm

    # ops registers the operator, which the module's JSON names
    from tvm_balanced.cuda import nvrtc
    from tvm_balanced import ops
    from tvm_balanced.build import export as toolchain  # noqa: F401
    from tvm_balanced.support.tensors import read_tensors

    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        raise RuntimeError("TVM's CUDA runtime library did not load")
    mod = tvm.ir.load_json((folder / "module.json").read_text())
    target = tvm.ir.load_json((folder / "target.json").read_text())
    params = read_tensors(folder / "params.safetensors")
    source, reference, scheduled = toolchain.build_and_export(
        mod,
        target,
        folder / "lib.so",
        params=params,
        build=job["build"],
        options=job["options"],
        compiler=job["compiler"],
        sources=job["sources"],
    )
    (folder / "device.cu").write_text(source)
    (folder / "reference").write_bytes(reference)
    return {"error": None, "compiler": nvrtc.compiler(), "scheduled": scheduled}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
