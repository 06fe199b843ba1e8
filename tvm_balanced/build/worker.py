"""Build one CUDA library in a process of its own: ``python -m tvm_balanced.build.worker FOLDER``.

TVM decides at import whether its CUDA runtime is there, and only with it does an exported library
hold machine code. Where the machine has no driver, a stand-in is loaded before TVM, which must
never happen in a process that may later use a GPU. :mod:`tvm_balanced.build.export` writes the
folder and reads the result.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from pathlib import Path


def main(directory: str) -> int:
    """Build the job in ``directory``; the outcome is left in its ``result.json``."""
    folder = Path(directory)
    try:
        result = _run(folder)
    except Exception as error:
        result = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def _run(folder: Path) -> dict[str, object]:
    # the loader goes by SONAME: what is loaded here is what TVM's library then finds
    for library in json.loads((folder / "preload.json").read_text()):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    import tvm

    # register the operators, which the module's JSON names
    import tvm_balanced.operators
    import tvm_balanced.te_operators  # noqa: F401
    from tvm_balanced.build.export import Job
    from tvm_balanced.cuda import nvrtc

    if tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
        raise RuntimeError("TVM's CUDA runtime library did not load")
    exported = Job.read(folder).run(folder / "lib.so")
    (folder / "device.cu").write_text(exported.cuda_source)
    (folder / "reference").write_bytes(exported.reference)
    return {
        "compiler": nvrtc.compiler(),
        "coverage": exported.coverage,
        "problems": exported.problems,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
