// An emulated CUDA device: the functions of libcuda.so.1 and libcudart.so.13 that TVM's CUDA
// runtime imports, over the engine of runtime.cpp, and those of libcublas.so.13 that
// cublas_matmul.cpp calls. device.py builds it, loads it in front of TVM and tells it what to do.
//
// * Device memory is host memory, each allocation between two unmapped pages and filled with NaN:
//   what runs over its end faults, and the fault becomes the error a GPU would report.
// * Streams are lazy: work runs when something waits for it, so a missing wait shows as stale data.
//   Order within a stream, events and the legacy default stream are kept. CUDA_LAUNCH_BLOCKING=1
//   runs everything at once.
// * A capturing stream records instead of running; what may not be captured ends it with an error.
// * An error while running a kernel is final for the device, as on a GPU, until emu_device_reset().
#include "include/engine.h"
#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <elf.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

namespace {

// the driver's and the runtime's error codes agree where both have one
const int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidImage = 200,
          kNoBinary = 209, kInvalidHandle = 400, kNotFound = 500, kNotReady = 600,
          kIllegalAddress = 700, kOutOfResources = 701, kLaunchFailure = 719, kNotSupported = 801,
          kCaptureUnsupported = 900, kCaptureInvalidated = 901;
struct ErrorText {
  int code;
  const char *driver, *runtime, *text;
};
const ErrorText kErrors[] = {
    {kOk, "CUDA_SUCCESS", "cudaSuccess", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "cudaErrorInvalidValue", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "out of memory"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "cudaErrorInvalidDevice",
     "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "cudaErrorInvalidKernelImage",
     "device kernel image is invalid"},
    {kNoBinary, "CUDA_ERROR_NO_BINARY_FOR_GPU", "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "cudaErrorInvalidResourceHandle",
     "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "cudaErrorSymbolNotFound", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "cudaErrorNotReady", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {kOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {kLaunchFailure, "CUDA_ERROR_LAUNCH_FAILED", "cudaErrorLaunchFailure",
     "unspecified launch failure"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "cudaErrorNotSupported", "operation not supported"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
};

// ------------------------------------------------------------------------------------------- state
struct Function {
  std::string name, kinds;   // one character a parameter: p a pointer, else its bytes as a digit
  std::vector<int> elements; // bytes of what a pointer points to
  long module = 0, static_shared = 0, max_threads = 1024, max_dynamic = 48 << 10;
  emu_kernel_fn thunk[2] = {nullptr, nullptr}; // plain, instrumented
};
struct Module {
  long id;
  std::map<std::string, std::unique_ptr<Function>> functions;
};
struct Allocation {
  char *base, *map;
  size_t bytes, mapped;
  bool host;
};
struct Stream;
struct Dependency {
  std::shared_ptr<Stream> stream;
  uint64_t ticket;
};
struct Op {
  std::vector<Dependency> after;
  std::function<void()> run;
};
struct Graph {
  std::vector<std::function<void()>> ops;
  std::vector<Function*> kernels;
};
struct Stream {
  std::deque<Op> queue;
  uint64_t issued = 0, done = 0; // tickets
  bool blocking = true;          // waits for the default stream, and it for this
  std::unique_ptr<Graph> capture;
  bool invalidated = false, global_mode = false;
};
struct Event {
  std::shared_ptr<Stream> stream; // null until recorded
  uint64_t ticket = 0;
  // shared with the recording: an event may be destroyed or recorded again before that runs
  std::shared_ptr<double> seconds = std::make_shared<double>(0.0);
};
struct Mode {
  int check, prof, order, threads;
  unsigned seed;
};
struct Launch {
  const Function* function;
  unsigned dims[6];
  long dynamic_shared;
  Mode mode;
  std::vector<long> blocks;
  std::vector<uint64_t> values; // parameters, eight bytes each
};
struct Figures {
  unsigned dims[6];
  long dynamic_shared, module;
  int instrumented;
  double seconds, scale;
  int graph; // run by the replay of a CUDA graph
};
struct Record {
  std::string kernel, report, error;
  std::string arrays; // for every range the engine saw, the first parameter that lies in it
  Figures figures;
};

// reports failures of Python's half in words
typedef long (*LoadCallback)(const void* image, long bytes);
typedef int (*CompileCallback)(long module, const char* kernel, int instrumented);

std::recursive_mutex g_mutex;
std::map<char*, Allocation> g_memory;
std::map<long, std::unique_ptr<Module>> g_modules;
std::map<Stream*, std::shared_ptr<Stream>> g_streams;
std::shared_ptr<Stream> g_default = std::make_shared<Stream>();
std::vector<Record> g_records;
std::map<int, int> g_attributes;
std::string g_name = "emulated CUDA device", g_detail;
size_t g_total = 0, g_used = 0;
int g_sticky = kOk;
thread_local int t_last = kOk;
Mode g_mode = {0, 0, 0, 1, 1};
int g_max_blocks = 0;
LoadCallback g_load = nullptr;
CompileCallback g_compile = nullptr;
int g_replaying = 0;
Mode g_replay_mode; // a replay runs in the mode of its launch, not of its capture

typedef std::lock_guard<std::recursive_mutex> Lock;
const size_t kPage = 4096, kAlign = 256;

int fail(int code, const std::string& detail = "") {
  if (code == kOk) return code;
  t_last = code;
  if (!detail.empty()) g_detail = detail;
  return code;
}
template <class... Args> int fail(int code, const char* format, Args... args) {
  return fail(code, emu_text(format, args...));
}
int alive_or(int code) { return g_sticky ? fail(g_sticky) : code; }
#define DEVICE_ALIVE()                                                                             \
  if (g_sticky) return fail(g_sticky)
template <class F> auto locked(F f) {
  Lock lock(g_mutex);
  return f();
}
template <class T> int give(T* out, T value) {
  *out = value;
  return kOk;
}
template <class T> int destroy(T* object) {
  delete object;
  return kOk;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::shared_ptr<Stream> find_stream(void* handle) {
  // 1 and 2 are the handles of the legacy and the per-thread default stream
  if (!handle || handle == (void*)1 || handle == (void*)2) return g_default;
  auto entry = g_streams.find((Stream*)handle);
  return entry == g_streams.end() ? nullptr : entry->second;
}

// ------------------------------------------------------------------------------------------ memory
Allocation* holding(const void* p) {
  auto next = g_memory.upper_bound((char*)p);
  if (next == g_memory.begin()) return nullptr;
  Allocation& a = std::prev(next)->second;
  return (char*)p < a.base + a.bytes ? &a : nullptr;
}
std::string describe(const void* p) {
  auto next = g_memory.upper_bound((char*)p);
  if (next == g_memory.begin()) return emu_text("address %p, no allocation of the device", p);
  const Allocation& a = std::prev(next)->second;
  return emu_text("address %p, byte %ld of an allocation of %zu", p, (long)((char*)p - a.base),
                  a.bytes);
}
int allocate(void** out, size_t bytes, bool host) {
  if (!out) return fail(kInvalidValue);
  *out = nullptr;
  if (!bytes) return kOk;
  if (!host && g_used + bytes > g_total)
    return fail(kOutOfMemory, "the emulated device has %zu MiB, %zu of them in use", g_total >> 20,
                g_used >> 20);
  size_t room = (bytes + kAlign - 1) / kAlign * kAlign, inner = (room + kPage - 1) / kPage * kPage,
         whole = inner + 2 * kPage;
  char* map =
      (char*)mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return fail(kOutOfMemory);
  if (mprotect(map + kPage, inner, PROT_READ | PROT_WRITE)) {
    munmap(map, whole);
    return fail(kOutOfMemory);
  }
  // up against the page behind it, so that running over the end faults
  char* base = map + kPage + inner - room;
  memset(base, 0xff, room); // NaN in every float format
  g_memory[base] = {base, map, bytes, whole, host};
  if (!host) g_used += bytes;
  *out = base;
  return kOk;
}
int release(void* p, bool host) {
  if (!p) return kOk;
  auto entry = g_memory.find((char*)p);
  if (entry == g_memory.end() || entry->second.host != host)
    return fail(kInvalidValue, "free of " + describe(p));
  if (!host) g_used -= entry->second.bytes;
  munmap(entry->second.map, entry->second.mapped);
  g_memory.erase(entry);
  return kOk;
}

// ----------------------------------------------------------------------------------------- streams
void run_until(const std::shared_ptr<Stream>& stream, uint64_t ticket) {
  while (stream->done < ticket && !stream->queue.empty()) {
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    for (auto& d : op.after) run_until(d.stream, d.ticket);
    if (!g_sticky) op.run(); // after a failed kernel nothing runs any more
    stream->done++;
  }
}
void run_all() {
  run_until(g_default, g_default->issued);
  for (auto& s : g_streams) run_until(s.second, s.second->issued);
}
int enqueue(const std::shared_ptr<Stream>& stream, std::function<void()> run,
            std::vector<Dependency> after = {}) {
  if (stream->capture) {
    if (!after.empty()) {
      stream->invalidated = true;
      return fail(kCaptureUnsupported, "the emulated device captures one stream only");
    }
    stream->capture->ops.push_back(std::move(run));
    return kOk;
  }
  if (stream == g_default) {
    for (auto& s : g_streams)
      if (s.second->blocking && !s.second->capture) after.push_back({s.second, s.second->issued});
  } else if (stream->blocking) {
    after.push_back({g_default, g_default->issued});
  }
  stream->queue.push_back({std::move(after), std::move(run)});
  stream->issued++;
  static const char* blocking = getenv("CUDA_LAUNCH_BLOCKING");
  if (blocking && *blocking == '1') run_until(stream, stream->issued);
  return alive_or(kOk);
}
// what must not happen while a stream captures in global mode: it would run outside of the graph
int refuse_while_capturing(const char* what) {
  bool any = false;
  for (auto& s : g_streams)
    if (s.second->capture && s.second->global_mode) {
      s.second->invalidated = true;
      any = true;
    }
  return any ? fail(kCaptureUnsupported, std::string(what) + " while a stream is capturing") : kOk;
}

// ----------------------------------------------------------------------------------------- kernels
// A fault inside a kernel goes on as an error of that thread: the fiber's context is sent to a
// function that reports and leaves the fiber for good.
void* g_fault_address;
void report_fault() {
  static thread_local std::string text; // this fiber is never left as functions are
  text = "access outside of device memory (" + describe(g_fault_address) + ")";
  emu_fail(text.c_str());
}
struct sigaction g_before[2];
const int kSignals[2] = {SIGSEGV, SIGBUS};
void on_fault(int signal, siginfo_t* info, void* context) {
  if (!emu_in_kernel()) { // not ours: the handler before gets it when the instruction runs again
    sigaction(signal, &g_before[signal == SIGBUS], nullptr);
    return;
  }
  g_fault_address = info->si_addr;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  // below the red zone, aligned as after a call
  registers[REG_RSP] = ((registers[REG_RSP] - 256) & ~15ll) - 8;
  registers[REG_RIP] = (greg_t)report_fault;
}
struct FaultsCaught {
  FaultsCaught() {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < 2; i++) sigaction(kSignals[i], &action, &g_before[i]);
  }
  ~FaultsCaught() {
    for (int i = 0; i < 2; i++) sigaction(kSignals[i], &g_before[i], nullptr);
  }
};

// keeps the record; an error in it is final for the device
void note(const std::string& what, Record record) {
  if (!record.error.empty()) {
    g_detail = what + ": " + record.error;
    g_sticky = record.error.find("access") != std::string::npos ? kIllegalAddress : kLaunchFailure;
  }
  g_records.push_back(std::move(record));
}
void execute(const Launch& launch) {
  const Function& f = *launch.function;
  std::vector<uint64_t> values = launch.values;
  std::vector<void*> args, lo;
  for (auto& v : values) args.push_back(&v);
  std::vector<long> bytes;
  std::vector<int> elements;
  std::string arrays;
  std::map<char*, size_t> known;
  for (size_t i = 0; i < f.kinds.size(); i++) {
    if (f.kinds[i] != 'p' || !values[i]) continue;
    Allocation* a = holding((void*)values[i]);
    if (!a) continue; // reading through it faults
    auto entry = known.find(a->base);
    if (entry != known.end()) {
      elements[entry->second] = std::min(elements[entry->second], f.elements[i]);
      continue;
    }
    known[a->base] = lo.size();
    lo.push_back(a->base);
    bytes.push_back((long)a->bytes);
    elements.push_back(f.elements[i]);
    arrays += (arrays.empty() ? "" : ",") + std::to_string(i);
  }
  const Mode& mode = g_replaying ? g_replay_mode : launch.mode;
  int instrumented = mode.check || mode.prof;
  EmuOptions o = {mode.check, mode.prof, mode.order, mode.seed, mode.threads};
  o.nblocks = (long)launch.blocks.size();
  o.blocks = launch.blocks.data();
  emu_set_ranges((int)lo.size(), lo.data(), bytes.data(), elements.data());
  double begin = now(), grid = (double)launch.dims[0] * launch.dims[1] * launch.dims[2];
  int failed;
  {
    FaultsCaught caught;
    emu_set_device_memory([](const void* p) { return (int)(holding(p) != nullptr); });
    failed = emu_launch(f.thunk[instrumented], args.data(), launch.dims,
                        f.static_shared + launch.dynamic_shared, &o);
    emu_set_device_memory(nullptr);
  }
  double scale = launch.blocks.empty() ? 1.0 : grid / (double)launch.blocks.size();
  Record r = {f.name, instrumented ? emu_report() : "", failed ? emu_error() : "", arrays, {}};
  double seconds = now() - begin;
  r.figures = {{}, launch.dynamic_shared, f.module, instrumented, seconds, scale, g_replaying};
  memcpy(r.figures.dims, launch.dims, sizeof launch.dims);
  note("kernel " + f.name, std::move(r));
}

int limit(int attribute, int fallback) {
  auto entry = g_attributes.find(attribute);
  return entry == g_attributes.end() ? fallback : entry->second;
}
const char* text_of(int code, const char* ErrorText::* field) {
  for (auto& e : kErrors)
    if (e.code == code) return e.*field;
  return "an error the emulated device does not know";
}
const char* explained(int code) {
  // kept for the process's life: callers hold the pointer
  static std::map<std::pair<int, std::string>, std::string> texts;
  Lock lock(g_mutex);
  auto& text = texts[{code, g_detail}];
  if (text.empty())
    text = std::string(text_of(code, &ErrorText::text)) +
           (code && !g_detail.empty() ? " (emulated device: " + g_detail + ")" : "");
  return text.c_str();
}

// cudaDeviceAttr
const int kThreadsPerBlock = 1, kBlockX = 2, kGridX = 5, kSharedPerBlock = 8, kSharedOptin = 97,
          kMajor = 75, kMinor = 76, kRegistersPerBlock = 12;

} // namespace

#define API extern "C" __attribute__((visibility("default")))

// ----------------------------------------------------------------------------------- for device.py
API void emu_device_configure(const char* name, long total_bytes, int n, const int* keys,
                              const int* values) {
  Lock lock(g_mutex);
  g_name = name;
  g_total = (size_t)total_bytes;
  g_attributes.clear();
  for (int i = 0; i < n; i++) g_attributes[keys[i]] = values[i];
}
API void emu_device_callbacks(LoadCallback load, CompileCallback compile) {
  g_load = load;
  g_compile = compile;
}
API void emu_device_mode(int check, int prof, int order, unsigned seed, int threads,
                         int max_blocks) {
  Lock lock(g_mutex);
  g_mode = {check, prof, order, threads, seed};
  g_max_blocks = max_blocks;
}
API void emu_device_function(long module, const char* name, const char* kinds, const int* elements,
                             long max_threads) {
  Lock lock(g_mutex);
  auto& m = g_modules[module];
  if (!m) { m.reset(new Module{module, {}}); }
  auto f = std::make_unique<Function>();
  f->name = name;
  f->kinds = kinds;
  f->module = module;
  f->max_threads = max_threads;
  f->elements.assign(elements, elements + f->kinds.size());
  m->functions[name] = std::move(f);
}
API void emu_device_compiled(long module, const char* name, int instrumented, emu_kernel_fn thunk,
                             long static_shared) {
  Lock lock(g_mutex);
  Function& f = *g_modules.at(module)->functions.at(name);
  f.thunk[instrumented] = thunk;
  f.static_shared = static_shared;
}
API void emu_device_detail(const char* text) {
  locked([text] { g_detail = text; });
}
API long emu_device_records() {
  return locked([] { return (long)g_records.size(); });
}
API void emu_device_forget() {
  locked([] { g_records.clear(); });
}
struct RecordView { // device.py has it too
  const char *kernel, *report, *error, *arrays;
  Figures figures;
};
// valid until records are forgotten or another launch runs
API void emu_device_record(long i, RecordView* out) {
  Lock lock(g_mutex);
  const Record& r = g_records.at(i);
  *out = {r.kernel.c_str(), r.report.c_str(), r.error.c_str(), r.arrays.c_str(), r.figures};
}
API int emu_device_synchronize() {
  Lock lock(g_mutex);
  run_all();
  return g_sticky;
}
API void emu_device_reset() { // forgets a failed kernel and what was queued behind it; memory stays
  Lock lock(g_mutex);
  g_sticky = kOk;
  g_detail.clear();
  t_last = kOk;
  for (auto& s : g_streams) {
    s.second->queue.clear();
    s.second->done = s.second->issued;
    s.second->capture.reset();
    s.second->invalidated = false;
  }
  g_default->queue.clear();
  g_default->done = g_default->issued;
}
API long emu_device_used() {
  return locked([] { return (long)g_used; });
}

// ------------------------------------------------------------------------------------ libcuda.so.1
API int cuGetErrorName(int code, const char** out) {
  return give(out, text_of(code, &ErrorText::driver));
}
API int cuGetErrorString(int code, const char** out) { return give(out, explained(code)); }
API int cuDeviceGetName(char* name, int length, int device) {
  if (device) return fail(kInvalidDevice);
  snprintf(name, (size_t)length, "%s", g_name.c_str());
  return kOk;
}
API int cuModuleLoadData(Module** out, const void* image) {
  {
    Lock lock(g_mutex);
    DEVICE_ALIVE();
  }
  if (!image || !g_load) return fail(kInvalidImage);
  long bytes;
  if (!memcmp(image, ELFMAG, SELFMAG)) {
    // the end of the section or of the program headers, whichever is later
    const Elf64_Ehdr& e = *(const Elf64_Ehdr*)image;
    bytes = (long)std::max({(uint64_t)sizeof e, e.e_phoff + (uint64_t)e.e_phentsize * e.e_phnum,
                            e.e_shoff + (uint64_t)e.e_shentsize * e.e_shnum});
  } else {
    bytes = (long)strlen((const char*)image);
  }
  // without the lock: Python's half may wait for another thread, which may wait for this device
  long id = g_load(image, bytes);
  if (id <= 0) return fail(kNoBinary);
  Lock lock(g_mutex);
  return give(out, g_modules.at(id).get());
}
API int cuModuleUnload(Module* module) {
  Lock lock(g_mutex);
  for (auto& m : g_modules)
    if (m.second.get() == module) {
      run_all();
      g_modules.erase(m.first);
      return kOk;
    }
  return fail(kInvalidHandle);
}
API int cuModuleGetFunction(Function** out, Module* module, const char* name) {
  Lock lock(g_mutex);
  auto entry = module->functions.find(name);
  if (entry == module->functions.end())
    return fail(kNotFound, std::string("there is no kernel ") + name);
  return give(out, entry->second.get());
}
API int cuFuncSetAttribute(Function* f, int attribute, int value) {
  Lock lock(g_mutex);
  const int kMaxDynamicShared = 8;
  if (attribute != kMaxDynamicShared)
    return fail(kNotSupported, "attribute %d of a kernel", attribute);
  if (value < 0 || value + f->static_shared > limit(kSharedOptin, 48 << 10))
    return fail(kInvalidValue,
                "kernel %s: %d bytes of dynamic shared memory are more "
                "than a block of this device can have",
                f->name.c_str(), value);
  f->max_dynamic = value;
  return kOk;
}
static bool compiled(Function* f, int variant) {
  return f->thunk[variant] || (g_compile && !g_compile(f->module, f->name.c_str(), variant));
}
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  const int* attributes;
  unsigned num_attributes;
};
static int refused(const LaunchConfig* c, const Function* f, void** extra) {
  const char* name = f->name.c_str();
  if (extra) return fail(kNotSupported, "kernel %s: parameters by extra", name);
  if (c->num_attributes && c->attributes && c->attributes[0] != 0)
    return fail(kNotSupported, "kernel %s: launch attribute %d is not emulated", name,
                c->attributes[0]);
  long threads = (long)c->block[0] * c->block[1] * c->block[2];
  if (!threads || threads > limit(kThreadsPerBlock, 1024))
    return fail(kInvalidValue, "kernel %s: %ld threads a block", name, threads);
  if (threads > f->max_threads)
    return fail(kOutOfResources, "kernel %s: %ld threads a block, compiled for %ld", name, threads,
                f->max_threads);
  const unsigned most[3] = {2147483647u, 65535, 65535}, *grid = c->grid;
  for (int i = 0; i < 3; i++)
    if (!grid[i] || grid[i] > most[i])
      return fail(kInvalidValue, "kernel %s: a grid of %u x %u x %u", name, grid[0], grid[1],
                  grid[2]);
  return kOk;
}
// the launch inspected in some blocks, spread over the grid with both ends among them; then memory
// is put back, so that all of them can run plain and the results are whole
static void inspect(Launch launch, long total, long count) {
  for (long i = 0; i < count; i++)
    launch.blocks.push_back(count == 1 ? 0 : i * (total - 1) / (count - 1));
  std::map<char*, std::vector<char>> before;
  for (size_t i = 0; i < launch.values.size(); i++) {
    bool pointer = launch.function->kinds[i] == 'p';
    Allocation* a = pointer ? holding((void*)launch.values[i]) : nullptr;
    if (a && !before.count(a->base)) before[a->base].assign(a->base, a->base + a->bytes);
  }
  execute(launch);
  for (auto& b : before) memcpy(b.first, b.second.data(), b.second.size());
}
API int cuLaunchKernelEx(const LaunchConfig* c, Function* f, void** params, void** extra) {
  Launch launch;
  {
    Lock lock(g_mutex);
    DEVICE_ALIVE();
    if (int code = refused(c, f, extra)) return code;
    launch.mode = g_mode;
    launch.function = f;
    launch.dynamic_shared = c->shared;
    memcpy(launch.dims, c->grid, 12);
    memcpy(launch.dims + 3, c->block, 12);
  }
  int instrumented = launch.mode.check || launch.mode.prof;
  long total = (long)c->grid[0] * c->grid[1] * c->grid[2], count = g_max_blocks;
  bool sampled = instrumented && count && total > count;
  // without the lock, as above; the mode is the one at the time of the launch
  for (int variant = 0; variant < 2; variant++) {
    bool needed = variant == instrumented || sampled;
    if (needed && !compiled(f, variant)) return fail(kInvalidImage);
  }
  Lock lock(g_mutex);
  if (launch.dynamic_shared > f->max_dynamic ||
      f->static_shared + launch.dynamic_shared > limit(kSharedOptin, 48 << 10))
    return fail(
        kInvalidValue,
        "kernel %s: %ld bytes of dynamic shared memory, at most %ld were asked for beforehand",
        f->name.c_str(), launch.dynamic_shared, f->max_dynamic);
  for (size_t i = 0; i < f->kinds.size(); i++) {
    uint64_t value = 0;
    memcpy(&value, params[i], f->kinds[i] == 'p' ? 8 : (size_t)(f->kinds[i] - '0'));
    launch.values.push_back(value);
  }
  auto stream = find_stream(c->stream);
  if (!stream) return fail(kInvalidHandle);
  if (sampled) {
    if (int code = enqueue(stream, [launch, total, count] { inspect(launch, total, count); }))
      return code;
    launch.mode.check = launch.mode.prof = 0;
  }
  if (stream->capture) stream->capture->kernels.push_back(f);
  return enqueue(stream, [launch] { execute(launch); });
}
API int cuTensorMapEncodeTiled(...) { return fail(kNotSupported, "tensor maps are not emulated"); }

// --------------------------------------------------------------------------------- libcudart.so.13
API const char* cudaGetErrorName(int code) { return text_of(code, &ErrorText::runtime); }
API const char* cudaGetErrorString(int code) { return explained(code); }
API int cudaGetLastError() {
  int code = g_sticky ? g_sticky : t_last;
  t_last = kOk;
  return code;
}
API int cudaPeekAtLastError() { return g_sticky ? g_sticky : t_last; }
API int cudaGetDeviceCount(int* n) { return give(n, 1); }
API int cudaGetDevice(int* device) { return give(device, 0); }
API int cudaSetDevice(int device) { return device ? fail(kInvalidDevice) : kOk; }
API int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  Lock lock(g_mutex);
  if (device) return fail(kInvalidDevice);
  auto entry = g_attributes.find(attribute);
  if (entry == g_attributes.end())
    return fail(kInvalidValue, "device attribute %d is not known to the emulated device",
                attribute);
  return give(value, entry->second);
}
struct Properties { // the head of cudaDeviceProp of CUDA 13; what follows is left as it was
  char name[256];
  unsigned char uuid[16];
  char luid[8];
  unsigned mask;
  size_t total, shared_per_block;
  int registers, warp;
  size_t pitch;
  int max_threads, max_dim[3], max_grid[3];
  size_t constant;
  int major, minor;
};
API int cudaGetDeviceProperties(Properties* p, int device) {
  Lock lock(g_mutex);
  if (device) return fail(kInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", g_name.c_str());
  p->total = g_total;
  p->shared_per_block = (size_t)limit(kSharedPerBlock, 0);
  p->registers = limit(kRegistersPerBlock, 0);
  p->warp = 32;
  p->max_threads = limit(kThreadsPerBlock, 0);
  for (int i = 0; i < 3; i++) {
    p->max_dim[i] = limit(kBlockX + i, 0);
    p->max_grid[i] = limit(kGridX + i, 0);
  }
  p->major = limit(kMajor, 0);
  p->minor = limit(kMinor, 0);
  return kOk;
}
API int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  Lock lock(g_mutex);
  *total = g_total;
  *free_bytes = g_total - g_used;
  return kOk;
}
API int cudaMalloc(void** out, size_t bytes) {
  Lock lock(g_mutex);
  DEVICE_ALIVE();
  if (int code = refuse_while_capturing("cudaMalloc")) return code;
  return allocate(out, bytes, false);
}
API int cudaFree(void* p) {
  Lock lock(g_mutex);
  if (int code = refuse_while_capturing("cudaFree")) return code;
  run_all(); // cudaFree waits for the device
  return alive_or(release(p, false));
}
API int cudaMallocHost(void** out, size_t bytes) {
  return locked([=] { return allocate(out, bytes, true); });
}
API int cudaFreeHost(void* p) {
  Lock lock(g_mutex);
  run_all();
  return release(p, true);
}

static int copy(void* to, const void* from, size_t bytes, int kind, void* handle) {
  Lock lock(g_mutex);
  DEVICE_ALIVE();
  auto stream = find_stream(handle);
  if (!stream) return fail(kInvalidHandle);
  if (!bytes) return kOk;
  // kind: 0 host to host, 1 to the device, 2 from it, 3 within it, 4 by the addresses
  Allocation *target = holding(to), *source = holding(from);
  bool to_device = kind == 1 || kind == 3, from_device = kind == 2 || kind == 3;
  if (to_device && (!target || target->host)) return fail(kInvalidValue, "copy to " + describe(to));
  if (from_device && (!source || source->host))
    return fail(kInvalidValue, "copy from " + describe(from));
  if (target && (char*)to + bytes > target->base + target->bytes)
    return fail(kInvalidValue, "copy of %zu bytes to %s", bytes, describe(to).c_str());
  if (source && (char*)from + bytes > source->base + source->bytes)
    return fail(kInvalidValue, "copy of %zu bytes from %s", bytes, describe(from).c_str());
  if (stream->capture && ((!target && !to_device) || (!source && !from_device))) {
    stream->invalidated = true;
    return fail(kCaptureUnsupported, "copy to or from pageable memory while capturing");
  }
  if (!source && !stream->capture) {
    // pageable memory is read before the call returns, so that the caller may change it
    auto held = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
    return enqueue(stream, [to, held] { memcpy(to, held->data(), held->size()); });
  }
  int code = enqueue(stream, [to, from, bytes] { memmove(to, from, bytes); });
  // to pageable memory the call returns when the copy is there
  if (code || target) return code;
  run_until(stream, stream->issued);
  return alive_or(kOk);
}
API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  return copy(to, from, bytes, kind, stream);
}
API int cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                            size_t bytes, void* stream) {
  return to_device || from_device ? fail(kInvalidDevice) : copy(to, from, bytes, 3, stream);
}

API int cudaStreamCreateWithFlags(Stream** out, unsigned flags) {
  Lock lock(g_mutex);
  DEVICE_ALIVE();
  auto made = std::make_shared<Stream>();
  made->blocking = !(flags & 1); // cudaStreamNonBlocking
  *out = made.get();
  g_streams[made.get()] = made;
  return kOk;
}
API int cudaStreamCreate(Stream** out) { return cudaStreamCreateWithFlags(out, 0); }
API int cudaStreamDestroy(Stream* handle) {
  Lock lock(g_mutex);
  auto entry = g_streams.find(handle);
  if (entry == g_streams.end()) return fail(kInvalidHandle);
  run_until(entry->second, entry->second->issued); // what was queued is still done
  g_streams.erase(entry);
  return kOk;
}
API int cudaStreamSynchronize(void* handle) {
  Lock lock(g_mutex);
  auto stream = find_stream(handle);
  if (!stream) return fail(kInvalidHandle);
  if (stream->capture) {
    stream->invalidated = true;
    return fail(kCaptureUnsupported, "cudaStreamSynchronize of a capturing stream");
  }
  run_until(stream, stream->issued);
  // the default stream is done when the blocking ones before it are
  if (stream == g_default)
    for (auto& s : g_streams)
      if (s.second->blocking) run_until(s.second, s.second->issued);
  return alive_or(kOk);
}
API int cudaStreamWaitEvent(void* handle, Event* event, unsigned) {
  Lock lock(g_mutex);
  auto stream = find_stream(handle);
  if (!stream || !event) return fail(kInvalidHandle);
  if (!event->stream) return kOk; // never recorded: nothing to wait for
  return enqueue(stream, [] {}, {{event->stream, event->ticket}});
}
API int cudaStreamBeginCapture(void* handle, int mode) {
  Lock lock(g_mutex);
  DEVICE_ALIVE();
  auto stream = find_stream(handle);
  if (!stream) return fail(kInvalidHandle);
  if (stream == g_default) return fail(kCaptureUnsupported, "the default stream cannot capture");
  if (stream->capture) return fail(kInvalidValue, "the stream is capturing already");
  stream->capture = std::make_unique<Graph>();
  stream->invalidated = false;
  stream->global_mode = mode == 0; // cudaStreamCaptureModeGlobal
  return kOk;
}
API int cudaStreamEndCapture(void* handle, Graph** out) {
  Lock lock(g_mutex);
  *out = nullptr;
  auto stream = find_stream(handle);
  if (!stream || !stream->capture) return fail(kInvalidValue, "the stream is not capturing");
  auto graph = std::move(stream->capture);
  if (stream->invalidated) return fail(kCaptureInvalidated);
  return give(out, graph.release());
}
API int cudaGraphInstantiate(Graph** exec, Graph* graph, unsigned long long) {
  if (!graph) return fail(kInvalidValue);
  return give(exec, new Graph(*graph));
}
API int cudaGraphLaunch(Graph* exec, void* handle) {
  Mode mode;
  {
    Lock lock(g_mutex);
    DEVICE_ALIVE();
    if (!exec) return fail(kInvalidHandle);
    mode = g_mode;
  }
  int instrumented = mode.check || mode.prof;
  // without the lock, as for a launch
  for (Function* f : exec->kernels)
    if (!compiled(f, instrumented)) return fail(kInvalidImage);
  Lock lock(g_mutex);
  auto stream = find_stream(handle);
  if (!stream) return fail(kInvalidHandle);
  auto ops = exec->ops;
  return enqueue(stream, [ops, mode] {
    g_replaying = 1;
    g_replay_mode = mode;
    for (auto& op : ops)
      if (!g_sticky) op();
    g_replaying = 0;
  });
}
API int cudaGraphDestroy(Graph* graph) { return destroy(graph); }
API int cudaGraphExecDestroy(Graph* exec) { return destroy(exec); }

API int cudaEventCreate(Event** out) { return give(out, new Event); }
API int cudaEventDestroy(Event* event) { return destroy(event); }
API int cudaEventRecord(Event* event, void* handle) {
  Lock lock(g_mutex);
  DEVICE_ALIVE();
  auto stream = find_stream(handle);
  if (!event || !stream) return fail(kInvalidHandle);
  event->seconds = std::make_shared<double>(0.0);
  auto seconds = event->seconds;
  int code = enqueue(stream, [seconds] { *seconds = now(); });
  if (stream->capture) return code; // part of the graph, nothing to wait for
  event->stream = stream;
  event->ticket = stream->issued;
  return code;
}
API int cudaEventSynchronize(Event* event) {
  Lock lock(g_mutex);
  if (!event) return fail(kInvalidHandle);
  if (event->stream) run_until(event->stream, event->ticket);
  return alive_or(kOk);
}
API int cudaEventElapsedTime(float* milliseconds, Event* begin, Event* end) {
  Lock lock(g_mutex);
  if (!begin || !end || !begin->stream || !end->stream) return fail(kInvalidHandle);
  if (begin->stream->done < begin->ticket || end->stream->done < end->ticket)
    return fail(kNotReady);
  // of this CPU: says nothing about a GPU
  return give(milliseconds, (float)((*end->seconds - *begin->seconds) * 1e3));
}

// --------------------------------------------------------------------------------- libcublas.so.13
// Matrix products are computed in double and rounded once. They run in their stream's order, may be
// captured, and end the device as a kernel does when an operand is not all inside one allocation.
namespace {

const int kBlasOk = 0, kBlasNotInitialized = 1, kBlasAllocFailed = 3, kBlasInvalidValue = 7,
          kBlasExecutionFailed = 13, kBlasNotSupported = 15;
const int kF32 = 0, kF16 = 2, kBF16 = 14;
struct Blas {
  std::shared_ptr<Stream> stream;
};
std::map<Blas*, std::unique_ptr<Blas>> g_blas;

int blas_fail(int status, const std::string& detail) {
  g_detail = detail;
  return status;
}
template <class... Args> int blas_fail(int status, const char* format, Args... args) {
  return blas_fail(status, emu_text(format, args...));
}
size_t bytes_of(int type) { return type == kF32 ? 4 : 2; }
bool known(int type) { return type == kF32 || type == kF16 || type == kBF16; }

double load(const char* p, int type) {
  if (type == kF32) return *(const float*)p;
  uint16_t bits = *(const uint16_t*)p;
  if (type == kBF16) return emu_cast<float>((uint32_t)bits << 16);
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double v = exponent == 31 ? (fraction ? NAN : INFINITY)
             : exponent     ? ldexp(1024 + fraction, exponent - 25)
                            : ldexp(fraction, -24);
  return bits & 0x8000 ? -v : v;
}
// the nearest value of so many significant bits, the last one worth at least 2 to the `least`
double rounded(double v, int digits, int least) {
  if (v == 0 || !std::isfinite(v)) return v;
  int exponent;
  frexp(v, &exponent);
  int unit = std::max(exponent - digits, least);
  return ldexp(nearbyint(ldexp(v, -unit)), unit);
}
uint16_t half_bits(double v) {
  double a = std::fabs(rounded(v, 11, -24));
  if (std::isnan(v)) return 0x7fff;
  if (a >= 65520) return 0x7c00;
  if (a < ldexp(1, -14)) return (uint16_t)ldexp(a, 24); // zero and subnormals
  int exponent;
  double f = frexp(a, &exponent);
  return (uint16_t)((exponent + 14) << 10 | ((int)ldexp(f, 11) & 1023));
}
void store(char* p, double v, int type) {
  if (type == kF32) {
    *(float*)p = (float)v;
  } else if (type == kF16) {
    *(uint16_t*)p = half_bits(v) | (std::signbit(v) ? 0x8000 : 0);
  } else { // what bfloat16 holds is exact in float32
    uint32_t bits = emu_cast<uint32_t>((float)rounded(v, 8, -133));
    *(uint16_t*)p = std::isnan(v) ? 0x7fff : bits >> 16;
  }
}

struct Matrix { // as cuBLAS sees it: columns one after another
  const char* name;
  char* data;
  int type, ld;
  long long stride;
  int rows, columns;
  void shape(int transposed, int m, int n) {
    rows = transposed ? n : m;
    columns = transposed ? m : n;
  }
  long long bytes(int batch) const { // from the first element to the end of the last
    long long last = stride * (batch - 1) + (long long)(columns - 1) * ld + rows;
    return rows && columns ? last * (long long)bytes_of(type) : 0;
  }
  char* at(int row, int column, int batch) const {
    return data + (stride * batch + (long long)column * ld + row) * (long long)bytes_of(type);
  }
};
struct Product {
  const char* function;
  int op_a, op_b, m, n, k, batch;
  float alpha, beta;
  Matrix a, b, c;
};

// why an operand cannot be read or written, empty when it can
std::string misplaced(const Matrix& x, int batch) {
  long long bytes = x.bytes(batch);
  if (!bytes) return "";
  Allocation* a = holding(x.data);
  if (!a || a->host || x.data + bytes > a->base + a->bytes)
    return emu_text("access outside of device memory: %s has %lld bytes from %s", x.name, bytes,
                    describe(x.data).c_str());
  if ((uintptr_t)x.data % bytes_of(x.type))
    return emu_text("misaligned access: %s at %s", x.name, describe(x.data).c_str());
  return "";
}
bool overlap(const Matrix& x, const Matrix& y, int batch) {
  return x.data < y.data + y.bytes(batch) && y.data < x.data + x.bytes(batch);
}

void multiply(const Product& p, int s) {
  std::vector<double> b((size_t)p.n * p.k), row(p.k);
  for (int j = 0; j < p.n; j++)
    for (int l = 0; l < p.k; l++)
      b[(size_t)j * p.k + l] = load(p.op_b ? p.b.at(j, l, s) : p.b.at(l, j, s), p.b.type);
  for (int i = 0; i < p.m; i++) {
    for (int l = 0; l < p.k; l++)
      row[l] = load(p.op_a ? p.a.at(l, i, s) : p.a.at(i, l, s), p.a.type);
    for (int j = 0; j < p.n; j++) {
      double sums[4] = {0, 0, 0, 0};
      const double* column = &b[(size_t)j * p.k];
      int l = 0;
      for (; l + 4 <= p.k; l += 4)
        for (int u = 0; u < 4; u++) sums[u] += row[l + u] * column[l + u];
      for (; l < p.k; l++) sums[0] += row[l] * column[l];
      double v = p.alpha * (sums[0] + sums[1] + sums[2] + sums[3]);
      char* to = p.c.at(i, j, s);
      if (p.beta != 0) v += p.beta * load(to, p.c.type); // C is not read where beta is 0
      store(to, v, p.c.type);
    }
  }
}
void multiply(const Product& p) {
  double begin = now();
  std::string error;
  for (const Matrix* x : {&p.a, &p.b, &p.c})
    if (error.empty()) error = misplaced(*x, p.batch);
  for (const Matrix* x : {&p.a, &p.b})
    if (error.empty() && overlap(*x, p.c, p.batch)) error = std::string("C overlaps ") + x->name;
  for (int s = 0; s < p.batch && error.empty(); s++) multiply(p, s);
  Figures figures = {{(unsigned)p.m, (unsigned)p.n, (unsigned)p.batch, 1, 1, 1}};
  figures.seconds = now() - begin;
  figures.scale = 1;
  figures.graph = g_replaying;
  note(p.function, {p.function, "", error, "", figures});
}

int product(Blas* handle, Product p, const float* alpha, const float* beta, int compute) {
  Lock lock(g_mutex);
  if (g_sticky) return blas_fail(kBlasExecutionFailed, g_detail);
  if (!g_blas.count(handle))
    return blas_fail(kBlasNotInitialized, "the handle is not one of cublasCreate");
  const char* at = p.function;
  if (!alpha || !beta) return blas_fail(kBlasInvalidValue, "%s: alpha or beta is missing", at);
  p.alpha = *alpha;
  p.beta = *beta;
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.batch < 0)
    return blas_fail(kBlasInvalidValue, "%s: a negative extent", at);
  if ((p.op_a | p.op_b) & ~1)
    return blas_fail(kBlasNotSupported, "%s: an operation other than N and T is not emulated", at);
  p.a.shape(p.op_a, p.m, p.k);
  p.b.shape(p.op_b, p.k, p.n);
  p.c.shape(0, p.m, p.n);
  for (const Matrix* x : {&p.a, &p.b, &p.c}) {
    if (!known(x->type))
      return blas_fail(kBlasNotSupported, "%s: %s of type %d is not emulated", at, x->name,
                       x->type);
    if (x->ld < std::max(1, x->rows))
      return blas_fail(kBlasInvalidValue,
                       "%s: the leading dimension %d of %s is less than its %d rows", at, x->ld,
                       x->name, x->rows);
  }
  // the table of cublasGemmEx for sums in float32
  if (compute != 68)
    return blas_fail(kBlasNotSupported, "%s: compute type %d is not emulated", at, compute);
  if (p.a.type != p.b.type || (p.c.type != p.a.type && p.c.type != kF32))
    return blas_fail(kBlasNotSupported, "%s: no kernel for these types together", at);
  if (!p.m || !p.n || !p.batch) return kBlasOk;
  return enqueue(g_blas.at(handle)->stream, [p] { multiply(p); })
             ? blas_fail(kBlasExecutionFailed, g_detail)
             : kBlasOk;
}

} // namespace

API const char* cublasGetStatusString(int status) {
  static const std::map<int, const char*> names = {
      {kBlasOk, "success"},
      {kBlasNotInitialized, "the library was not initialized"},
      {kBlasAllocFailed, "the resource allocation failed"},
      {kBlasInvalidValue, "an invalid value"},
      {kBlasExecutionFailed, "the execution failed"},
      {kBlasNotSupported, "not supported"}};
  static std::map<std::string, bool> texts; // kept for the process's life: callers hold the pointer
  Lock lock(g_mutex);
  auto entry = names.find(status);
  std::string text =
      entry == names.end() ? "a status the emulated device does not know" : entry->second;
  if (status && !g_detail.empty()) text += " (emulated device: " + g_detail + ")";
  return texts.emplace(text, true).first->first.c_str();
}
API int cublasCreate_v2(Blas** out) {
  Lock lock(g_mutex);
  if (!out) return kBlasInvalidValue;
  if (g_sticky) return blas_fail(kBlasNotInitialized, g_detail);
  // it allocates device memory
  if (refuse_while_capturing("cublasCreate")) return kBlasAllocFailed;
  auto made = std::make_unique<Blas>();
  made->stream = g_default;
  *out = made.get();
  g_blas[made.get()] = std::move(made);
  return kBlasOk;
}
API int cublasDestroy_v2(Blas* handle) {
  Lock lock(g_mutex);
  if (!g_blas.count(handle)) return kBlasNotInitialized;
  run_all(); // as it frees memory
  g_blas.erase(handle);
  return kBlasOk;
}
API int cublasSetStream_v2(Blas* handle, void* stream) {
  Lock lock(g_mutex);
  if (!g_blas.count(handle)) return kBlasNotInitialized;
  auto entry = find_stream(stream);
  if (!entry)
    return blas_fail(kBlasInvalidValue, "cublasSetStream: the stream is not one of this device");
  g_blas[handle]->stream = entry;
  return kBlasOk;
}
API int cublasGemmStridedBatchedEx(Blas* handle, int op_a, int op_b, int m, int n, int k,
                                   const float* alpha, const void* a, int type_a, int lda,
                                   long long stride_a, const void* b, int type_b, int ldb,
                                   long long stride_b, const float* beta, void* c, int type_c,
                                   int ldc, long long stride_c, int batch, int compute, int) {
  Product p = {"cublasGemmStridedBatchedEx", op_a, op_b, m, n, k, batch};
  p.a = {"A", (char*)a, type_a, lda, stride_a};
  p.b = {"B", (char*)b, type_b, ldb, stride_b};
  p.c = {"C", (char*)c, type_c, ldc, stride_c};
  return product(handle, p, alpha, beta, compute);
}
API int cublasGemmEx(Blas* handle, int op_a, int op_b, int m, int n, int k, const float* alpha,
                     const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                     const float* beta, void* c, int type_c, int ldc, int compute, int) {
  Product p = {"cublasGemmEx", op_a, op_b, m, n, k, 1};
  p.a = {"A", (char*)a, type_a, lda};
  p.b = {"B", (char*)b, type_b, ldb};
  p.c = {"C", (char*)c, type_c, ldc};
  return product(handle, p, alpha, beta, compute);
}
