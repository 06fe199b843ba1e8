// Matrix products by cuBLAS, as a function of the compiled library: lib.so has it among its own
// symbols, so that plain TVM and C++ programs find it too.
//
//   tvm_balanced_cublas_matmul(a, b, transpose_a, transpose_b, c)      c = op(a) @ op(b)
//
// * a, b and c are contiguous tensors on one CUDA device; a transpose swaps the last two axes. b
// may
//   have fewer axes than a, or extents of 1 in front: it is then the same for the whole batch, and
//   so may a be.
// * float32, float16 or bfloat16 in, the same or float32 out; sums are float32, never TF32.
// * Runs on TVM's current stream. cuBLAS keeps its own workspace: it is right for any number of
//   streams, and inside of a CUDA graph.
//
// libcublas is opened at the first call, so that a library loads where it is missing: what the
// process has already, else the one beside the CUDA runtime, else the one of PyPI beside TVM, else
// the system's.
#include <dlfcn.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <climits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace {

// of cublas_api.h and library_types.h, version 13; no CUDA toolkit is needed to compile this
typedef struct cublasContext* Handle;
enum { kOpN = 0, kOpT = 1, kF32 = 0, kF16 = 2, kBF16 = 14, kCompute32F = 68, kAlgoDefault = -1 };
typedef int (*SetDevice)(int);
typedef int (*Create)(Handle*);
typedef int (*SetStream)(Handle, void*);
typedef const char* (*StatusString)(int);
typedef int (*Gemm)(Handle, int, int, int, int, int, const void*, const void*, int, int,
                    const void*, int, int, const void*, void*, int, int, int, int);
typedef int (*GemmBatched)(Handle, int, int, int, int, int, const void*, const void*, int, int,
                           long long, const void*, int, int, long long, const void*, void*, int,
                           int, long long, int, int, int);

std::string folder_of(const void* symbol) {
  Dl_info info;
  if (!symbol || !dladdr(symbol, &info) || !info.dli_fname) return "";
  std::string path = info.dli_fname;
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

struct Cublas {
  SetDevice set_device = nullptr;
  Create create = nullptr;
  SetStream set_stream = nullptr;
  StatusString status = nullptr;
  Gemm gemm = nullptr;
  GemmBatched gemm_batched = nullptr;

  Cublas() {
    const std::string name = "libcublas.so.13";
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
    std::string why;
    auto open = [&](const std::string& path) {
      if (library) return;
      library = dlopen(path.c_str(), RTLD_NOW);
      const char* problem = library ? nullptr : dlerror();
      if (problem) why = problem;
    };
    void* runtime = dlopen("libcudart.so.13", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = runtime ? dlsym(runtime, "cudaSetDevice") : nullptr;
    if (!symbol)
      throw std::runtime_error("libcudart.so.13, which TVM's CUDA runtime uses, is not loaded in "
                               "this process; load that runtime first");
    set_device = reinterpret_cast<SetDevice>(symbol);
    std::string beside = folder_of(symbol);
    if (!beside.empty()) open(beside + name);
    // site-packages/tvm_ffi/lib/ and site-packages/nvidia/cu13/lib/
    std::string ffi = folder_of(reinterpret_cast<const void*>(&TVMFFIEnvGetStream));
    if (!ffi.empty()) open(ffi + "../../nvidia/cu13/lib/" + name);
    open(name);
    if (!library)
      throw std::runtime_error("the library was compiled with dense=\"cublas\" and " + name +
                               " cannot be loaded (" + why +
                               "); pip install nvidia-cublas, or compile with dense=\"dlight\"");
    auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
      if (!function)
        throw std::runtime_error(name + " has no function " + symbol +
                                 "; install nvidia-cublas 13 or newer");
    };
    find(create, "cublasCreate_v2");
    find(set_stream, "cublasSetStream_v2");
    find(status, "cublasGetStatusString");
    find(gemm, "cublasGemmEx");
    find(gemm_batched, "cublasGemmStridedBatchedEx");
  }

  void check(int code, const char* what) const {
    if (code) throw std::runtime_error(std::string(what) + " failed: " + status(code));
  }
};

const Cublas& cublas() {
  // a failed constructor runs again at the next call, so the error is told every time
  static const Cublas* loaded = new Cublas();
  return *loaded;
}

// One handle a thread and device: two threads must not use one at a time. A thread leaves its
// handles to the next one instead of destroying them, which would free device memory while another
// thread may be capturing a graph, or after the driver has gone at the end of the process.
struct Idle {
  std::mutex mutex;
  std::multimap<int, Handle> handles;
};
Idle& idle() {
  static Idle* made = new Idle();
  return *made;
}
struct Handles {
  std::map<int, Handle> of_device;
  ~Handles() {
    std::lock_guard<std::mutex> lock(idle().mutex);
    for (auto& entry : of_device) idle().handles.insert(entry);
  }
};

Handle handle(int device) {
  static thread_local Handles handles;
  auto known = handles.of_device.find(device);
  if (known != handles.of_device.end()) return known->second;
  Handle made = nullptr;
  {
    std::lock_guard<std::mutex> lock(idle().mutex);
    auto left = idle().handles.find(device);
    if (left != idle().handles.end()) {
      made = left->second;
      idle().handles.erase(left);
    }
  }
  if (!made) cublas().check(cublas().create(&made), "cublasCreate");
  handles.of_device[device] = made;
  return made;
}

const DLTensor& tensor(const TVMFFIAny& value, const char* name) {
  if (value.type_index == kTVMFFITensor) return *TVMFFITensorGetDLTensorPtr(value.v_obj);
  if (value.type_index == kTVMFFIDLTensorPtr) return *static_cast<const DLTensor*>(value.v_ptr);
  throw std::invalid_argument(std::string(name) + " is no tensor");
}

int data_type(const DLTensor& t, const char* name) {
  if (t.dtype.lanes == 1 && t.dtype.code == kDLFloat && t.dtype.bits == 32) return kF32;
  if (t.dtype.lanes == 1 && t.dtype.code == kDLFloat && t.dtype.bits == 16) return kF16;
  if (t.dtype.lanes == 1 && t.dtype.code == kDLBfloat && t.dtype.bits == 16) return kBF16;
  throw std::invalid_argument(std::string(name) + " is not float32, float16 or bfloat16");
}

// a matrix of a batch: rows and columns as stored, and how many of them
struct Operand {
  const DLTensor& t;
  int64_t rows, columns, batch = 1;
  bool transposed;

  Operand(const DLTensor& given, bool transpose, const char* name)
      : t(given), transposed(transpose) {
    if (t.ndim < 2) throw std::invalid_argument(std::string(name) + " has fewer than two axes");
    if (t.device.device_type != kDLCUDA)
      throw std::invalid_argument(std::string(name) + " is not on a CUDA device");
    rows = t.shape[t.ndim - 2];
    columns = t.shape[t.ndim - 1];
    for (int i = 0; i < t.ndim - 2; i++) batch *= t.shape[i];
    int64_t dense = 1;
    for (int i = t.ndim - 1; t.strides && i >= 0; i--) {
      if (t.shape[i] != 1 && t.strides[i] != dense)
        throw std::invalid_argument(std::string(name) + " is not contiguous");
      dense *= t.shape[i];
    }
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  // of a, the extent that is not summed over
  int64_t outer() const { return transposed ? columns : rows; }
  int64_t inner() const { return transposed ? rows : columns; }
  long long stride() const { return batch == 1 ? 0 : rows * columns; }
};

int narrow(int64_t extent) {
  if (extent > INT_MAX)
    throw std::invalid_argument("an extent of " + std::to_string(extent) +
                                " is more than cuBLAS takes");
  return static_cast<int>(extent);
}

void matmul(const TVMFFIAny* args, int32_t num_args) {
  if (num_args != 5)
    throw std::invalid_argument("five arguments are expected, " + std::to_string(num_args) +
                                " were given");
  Operand a(tensor(args[0], "a"), args[2].v_int64 != 0, "a"),
      b(tensor(args[1], "b"), args[3].v_int64 != 0, "b");
  Operand c(tensor(args[4], "c"), false, "c");
  if (b.batch == 1 && a.batch > 1 && !a.transposed) {
    // one matrix for the whole batch: the batch is more rows
    a.rows *= a.batch;
    c.rows *= c.batch;
    a.batch = c.batch = 1;
  }
  int64_t m = a.outer(), k = a.inner(), n = b.inner();
  if (b.outer() != k || c.rows != m || c.columns != n)
    throw std::invalid_argument("a product of " + std::to_string(m) + " x " + std::to_string(k) +
                                " and " + std::to_string(b.outer()) + " x " + std::to_string(n) +
                                " does not fit a result of " + std::to_string(c.rows) + " x " +
                                std::to_string(c.columns));
  if ((a.batch != 1 && a.batch != c.batch) || (b.batch != 1 && b.batch != c.batch))
    throw std::invalid_argument("batches of " + std::to_string(a.batch) + " and " +
                                std::to_string(b.batch) + " do not fit a result of " +
                                std::to_string(c.batch));
  if (!m || !n || !c.batch) return;
  int kind = data_type(a.t, "a"), kind_c = data_type(c.t, "c");
  if (data_type(b.t, "b") != kind || (kind_c != kind && kind_c != kF32))
    throw std::invalid_argument("the dtypes of a, b and c do not fit");
  const Cublas& library = cublas();
  int device = c.t.device.device_id;
  if (library.set_device(device))
    throw std::runtime_error("CUDA device " + std::to_string(device) + " cannot be used");
  Handle with = handle(device);
  library.check(library.set_stream(with, TVMFFIEnvGetStream(kDLCUDA, device)), "cublasSetStream");
  // cuBLAS counts columns first, where a row-major matrix is its own transpose: c' = op(b)' op(a)'
  const float one = 1, zero = 0;
  int op_a = a.transposed ? kOpT : kOpN, op_b = b.transposed ? kOpT : kOpN;
  int lda = narrow(a.columns), ldb = narrow(b.columns), ldc = narrow(n);
  // a leading dimension of 0 is refused even where there is nothing to read
  if (lda < 1) lda = 1;
  if (ldb < 1) ldb = 1;
  if (c.batch == 1) {
    library.check(library.gemm(with, op_b, op_a, narrow(n), narrow(m), narrow(k), &one, b.data(),
                               kind, ldb, a.data(), kind, lda, &zero, c.data(), kind_c, ldc,
                               kCompute32F, kAlgoDefault),
                  "cublasGemmEx");
  } else {
    library.check(library.gemm_batched(with, op_b, op_a, narrow(n), narrow(m), narrow(k), &one,
                                       b.data(), kind, ldb, b.stride(), a.data(), kind, lda,
                                       a.stride(), &zero, c.data(), kind_c, ldc, c.stride(),
                                       narrow(c.batch), kCompute32F, kAlgoDefault),
                  "cublasGemmStridedBatchedEx");
  }
}

} // namespace

// the name under which tvm-ffi looks for a library's function, and its calling convention
extern "C" __attribute__((visibility("default"))) int
__tvm_ffi_tvm_balanced_cublas_matmul(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny*) {
  try {
    matmul(args, num_args);
    return 0;
  } catch (const std::invalid_argument& error) {
    TVMFFIErrorSetRaisedFromCStr(
        "ValueError", (std::string("matrix product by cuBLAS: ") + error.what()).c_str());
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
  }
  return -1;
}
