// What kernels (cudaemu.h), the engine (runtime.cpp) and the emulated device (device.cpp) share.
#pragma once
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct EmuTls {
  uint3 tid, bid, bdim, gdim;
  char* smem; // this block's shared memory; offset 0 is shared address 0
  unsigned lane, warp, linear;
  int instrument; // 0 when the hooks should return at once
};
extern thread_local EmuTls emu_tls __attribute__((tls_model("initial-exec")));

struct EmuOptions {
  int check, prof, order; // order of threads between barriers: 0 as numbered, 1 reverse, 2 random
  unsigned seed;
  int nthreads;
  long nblocks; // of `blocks`, the only ones to run; 0 for the whole grid
  const long* blocks;
};
typedef void (*emu_kernel_fn)(void** args);
typedef void (*emu_collective_fn)(void** args, unsigned mask); // args[lane]

extern "C" {
// called by kernels
void emu_barrier(int id, int count); // bar.sync
void emu_syncwarp(unsigned mask);
void emu_collective(emu_collective_fn fn, void* arg, unsigned mask, void* pc);
unsigned emu_activemask();
void emu_mem(const void* p, int size, int flags, void* pc); // flags: 1 write, 2 atomic
void emu_load(void* dst, const void* p, int size);          // a vector-wide access as one event
void emu_store(void* p, const void* src, int size);
void emu_async_copy(void* dst, const void* src, int size, int src_size);
void emu_async_commit();
void emu_async_wait(int keep);
void emu_fail(const char* message);
// called by those who launch them
void emu_set_ranges(int n, void** lo, const long* bytes, const int* elem);
void emu_set_device_memory(int (*is_device)(const void*));
int emu_launch(emu_kernel_fn fn, void** args, const unsigned* dims, long smem, const EmuOptions* o);
int emu_in_kernel();
const char* emu_error();
const char* emu_report();
}

// the first bytes of a value as another type; zeros behind them
template <class To, class From>
static inline __attribute__((always_inline)) To emu_cast(From from) {
  To to{};
  memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  return to;
}

#ifndef __CUDA_ARCH__ // the host's side
#include <cstdarg>
#include <cstdio>
#include <string>

__attribute__((format(printf, 1, 2))) static inline std::string emu_text(const char* format, ...) {
  char text[4096];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return text;
}
#endif
