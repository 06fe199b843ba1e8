// Runs a library compiled by tvm-balanced with TVM's C++ runtime alone: no Python, no compiler.
//
//   deploy LIB.so INPUT.raw 8,512 [cpu|cuda]
//
// INPUT.raw holds the one input's float32 values in C order. Every output is printed as one line
// with its shape and one line with its values.

// only headers of tvm_ffi: those of the TVM wheel include some that it does not ship
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using ffi::Tensor;

namespace {

constexpr DLDataType kFloat32{kDLFloat, 32, 1};

std::vector<int64_t> ParseShape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream stream(text);
  for (std::string extent; std::getline(stream, extent, ',');) {
    shape.push_back(std::stoll(extent));
    if (shape.back() <= 0)
      throw std::runtime_error("an extent of the shape is not positive: " + text);
  }
  return shape;
}

std::vector<float> ReadRaw(const std::string& path, size_t count) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  const auto bytes = static_cast<size_t>(file.tellg());
  if (bytes != count * sizeof(float)) {
    throw std::runtime_error(path + " has " + std::to_string(bytes) + " bytes, expected " +
                             std::to_string(count * sizeof(float)));
  }
  std::vector<float> values(count);
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(bytes));
  return values;
}

ffi::Function Get(const ffi::Module& module, const std::string& name) {
  auto function = module->GetFunction(name, /*query_imports=*/false);
  if (!function.has_value()) throw std::runtime_error("the library has no function " + name);
  return *function;
}

Tensor Allocate(const ffi::Shape& shape, DLDevice device) {
  static const auto allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  return allocate(shape, kFloat32, device, ffi::Optional<ffi::String>()).cast<Tensor>();
}

// a virtual machine of the library's program, on one device, with pooled memory
ffi::Module CreateMachine(const ffi::Module& library, DLDevice device) {
  constexpr int kPooled = 2; // tvm::runtime::memory::AllocatorType::kPooled
  auto machine = Get(library, "vm_load_executable")().cast<ffi::Module>();
  auto initialize = Get(machine, "vm_initialization");
  if (device.device_type == kDLCPU) {
    initialize(static_cast<int>(kDLCPU), 0, kPooled);
  } else {
    // shapes are computed on the host, so the CPU always comes last
    initialize(static_cast<int>(device.device_type), device.device_id, kPooled,
               static_cast<int>(kDLCPU), 0, kPooled);
  }
  return machine;
}

void Print(const Tensor& tensor) {
  static const auto copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
  const DLDataType type = tensor.dtype();
  if (type.code != kDLFloat || type.bits != 32 || type.lanes != 1) {
    throw std::runtime_error("this example prints float32 outputs only");
  }
  std::printf("shape");
  for (int64_t extent : tensor.shape()) std::printf(" %lld", static_cast<long long>(extent));
  std::printf("\n");
  std::vector<float> values(static_cast<size_t>(tensor.numel()));
  // waits for the device
  copy(tensor, static_cast<void*>(values.data()), values.size() * sizeof(float));
  for (size_t i = 0; i < values.size(); ++i) std::printf(i ? " %.9g" : "%.9g", values[i]);
  std::printf("\n");
}

void PrintAll(const ffi::Any& result) {
  if (auto tensor = result.as<Tensor>()) {
    Print(*tensor);
    return;
  }
  for (const ffi::Any& field : result.cast<ffi::Array<ffi::Any>>()) PrintAll(field);
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr, "usage: %s LIB.so INPUT.raw 8,512 [cpu|cuda]\n", argv[0]);
    return 2;
  }
  try {
    const bool cuda = argc == 5 && std::strcmp(argv[4], "cuda") == 0;
    const DLDevice device{cuda ? kDLCUDA : kDLCPU, 0};
    const std::vector<int64_t> shape = ParseShape(argv[3]);
    size_t count = 1;
    for (int64_t extent : shape) count *= static_cast<size_t>(extent);
    std::vector<float> values = ReadRaw(argv[2], count);

    const ffi::Module library = ffi::Module::LoadFromFile(argv[1]);
    const ffi::Module machine = CreateMachine(library, device);
    const Tensor input = Allocate(ffi::Shape(shape), device);
    const auto copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
    copy(input, static_cast<void*>(values.data()), count * sizeof(float));
    PrintAll(Get(machine, "main")(input));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
