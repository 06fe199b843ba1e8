#!/usr/bin/env bash
# Pack this checkout, TVM and CUDA's C++ headers for a GPU host that has Python, PyTorch for CUDA 13 and no registry.
#   benchmarks/pack_site.sh OUT_DIR [PYTHON_VERSION=3.12] [PACKAGE ...]
# PACKAGE: what else that host lacks of click rich ml-dtypes safetensors cuda-bindings cuda-pathfinder transformers ...
# (each by name; dependencies are not followed). PRESET=6 packs in seconds instead of minutes, and 15 % larger.
# There:  mkdir -p SITE && tar -xJf site.tar.xz -C SITE && . SITE/env.sh && python3 -m tvm_balanced.cli.main bench ...
set -euo pipefail
out=${1:?usage: pack_site.sh OUT_DIR [PYTHON_VERSION] [PACKAGE ...]}; py=${2:-3.12}; shift; shift || true
mkdir -p "$out"; out=$(cd "$out" && pwd); cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
requirement() { sed -n "s/^ *\\($1[=>~].*\\)\$/\\1/p" setup.cfg | head -1; }
platforms=(); for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
get() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$py" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform any -d "$work/wheels" "$@"; }
get "$(requirement apache-tvm)" "$(requirement apache-tvm-ffi)" "nvidia-cuda-cccl>=13,<13.1" "$@"
mkdir -p "$work/site"
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
rm -rf build/lib; python3 -m pip install -q --no-deps --target "$work/site" .
commit=$(git rev-parse --short=10 HEAD)$(git diff --quiet HEAD -- || echo +)
cd "$work/site"
rm -rf bin tvm/3rdparty tvm/src tvm/web tvm/cmake tvm/licenses
find . -name __pycache__ -prune -exec rm -rf {} +
find . -name '*.so*' -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
echo "export TVM_BALANCED_COMMIT=$commit" > env.sh
cat >> env.sh <<'ENV'
# source me: Python finds the site, and the site finds NVRTC and the CUDA runtime of PyTorch or of the system
site=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# in a checkout, its folder tvm_balanced without the mapped ones must not come first
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# one folder with all that the four CUDA wheels would have: what is missing in it is linked to where it is
found=$(python3 - "$site" <<'PY'
import importlib.util, sys
spec = importlib.util.find_spec("nvidia")
for place in spec.submodule_search_locations if spec else []:
    if not place.startswith(sys.argv[1]):
        print(place + "/cu13")
PY
)
mkdir -p "$site/nvidia/cu13/include" "$site/nvidia/cu13/lib"
for root in $found /usr/local/cuda /usr/local/cuda/targets/x86_64-linux; do
  for file in "$root"/include/* "$root"/lib/libcudart.so* "$root"/lib/libnvrtc*.so* \
              "$root"/lib64/libcudart.so* "$root"/lib64/libnvrtc*.so*; do
    kind=lib; case $file in */include/*) kind=include ;; esac
    name=$site/nvidia/cu13/$kind/$(basename "$file")
    if [ -e "$file" ] && [ ! -e "$name" ]; then ln -s "$file" "$name"; fi
  done
done
export LD_LIBRARY_PATH=$site/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ -d /usr/local/nvidia/lib64 ]; then export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/local/nvidia/lib64; fi
ENV
tar -c --sort=name . | xz -T2 --x86 "--lzma2=preset=${PRESET:-9e},dict=384MiB" > "$work/site.tar.xz"
mv "$work/site.tar.xz" "$out/site.tar.xz"; ls -l "$out/site.tar.xz"
