/* Calls one kernel of a shared library without TVM's runtime:

       runner LIBRARY SYMBOL < arguments > results

   An argument: code, bits and rank as int32, four extents as int64, then the elements. Elements of
   all arguments are written back in their order. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

enum { MOST = 16, THREADS = 3 };

static void give_up(const char *why) {
  fprintf(stderr, "%s\n", why);
  exit(1);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

/* tasks one after the other; none of the kernels waits for another task */
static int launch(FTVMParallelLambda task, void *data, int count) {
  TVMParallelGroupEnv group = {NULL, count ? count : THREADS};
  for (int i = 0; i < group.num_task; i++) {
    if (task(i, &group, data)) return -1;
  }
  return 0;
}

static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int release(int type, int id, void *data) {
  (void)type, (void)id;
  free(data);
  return 0;
}

static void provide(void *library, const char *name, void *function) {
  void **place = dlsym(library, name);
  if (place) *place = function;
}

int main(int argc, char **argv) {
  void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : NULL;
  if (!library) give_up(argc == 3 ? dlerror() : "usage: runner LIBRARY SYMBOL");
  provide(library, "__TVMBackendParallelLaunch", launch);
  provide(library, "__TVMBackendAllocWorkspace", allocate);
  provide(library, "__TVMBackendFreeWorkspace", release);
  TVMFFISafeCallType kernel = dlsym(library, argv[2]);
  if (!kernel) give_up(dlerror());

  static DLTensor tensors[MOST];
  static TVMFFIAny arguments[MOST];
  static int64_t extents[MOST][4];
  static size_t bytes[MOST];
  int32_t head[3], count = 0;
  while (fread(head, sizeof head, 1, stdin)) {
    if (count == MOST || head[2] > 4) give_up("too many arguments or axes");
    if (!fread(extents[count], sizeof extents[count], 1, stdin)) give_up("no extents");
    size_t size = head[1] / 8;
    for (int i = 0; i < head[2]; i++) size *= extents[count][i];
    void *data = allocate(kDLCPU, 0, size, 0, 0);
    if (fread(data, 1, size, stdin) != size) give_up("no elements");
    tensors[count] = (DLTensor){
        data, {kDLCPU, 0}, head[2], {head[0], head[1], 1}, extents[count], NULL, 0};
    arguments[count].type_index = kTVMFFIDLTensorPtr;
    arguments[count].v_ptr = &tensors[count];
    bytes[count++] = size;
  }
  TVMFFIAny result = {0};
  if (kernel(NULL, arguments, count, &result)) give_up("the kernel refused its arguments");
  for (int i = 0; i < count; i++) fwrite(tensors[i].data, 1, bytes[i], stdout);
  return 0;
}
